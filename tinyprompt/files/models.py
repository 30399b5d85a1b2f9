"""Read and write frozen models: Hugging Face directories and T5X checkpoints."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tinyprompt import ops, tokenizer
from tinyprompt.config import Config, weight_shapes
from tinyprompt.errors import CheckpointError
from tinyprompt.files import hub, safetensors, t5x, torch_bin
from tinyprompt.files.config import check_generation, parse_config
from tinyprompt.files.io import Content, check_new, read_json, state, write_folder
from tinyprompt.model import Model, Tokenizer
from tinyprompt.tree import Flat, flatten, freeze, nest

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first existing name is used, as a whole file or as shards
TOKENIZER_FILES = (
    "tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
COPY = 2**26  # total size of the weights in bytes up to which they are copied into memory
WIDEN = 2**30  # total size of 16-bit weights in bytes up to which they are widened at once
TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # copies of shared.weight
LEFTOVER = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # transformers ignores it too


def default_model() -> Path:
    """Return the folder of the built-in size "base"."""
    return hub.built_in("base")


def load(folder: str | Path | None = None, stored: bool = False, tokenizer: bool = True) -> Model:
    """Open a T5: a Hugging Face directory, a T5X checkpoint, or a built-in or pulled model by name.

    Weights stay in the file (memory-mapped), except those of T5X, which are read into memory. Computation is in
    float32. 16-bit weights of up to 1 GiB are widened at once, which is faster; larger ones are widened one at a time
    where they are used, which saves memory.

    Args:
        folder: A path, a built-in size ("tiny", "small" or "base"), or the name of a pulled model. The default is
            "base".
        stored: Keep all weights as stored, whatever their size.
        tokenizer: Set to False to allow a folder without a tokenizer. The tokenizer of the model is then None.

    Returns:
        The model with its read-only weights.

    Raises:
        CheckpointError: The model cannot be used. The message names the file and the key.

    Example:
        >>> model = load("tiny")
    """
    folder = hub.find(folder) if folder is not None else default_model()
    _, config, weights = open_model(folder)
    words: Any = None
    try:
        words = read_tokenizer(folder, config)
    except CheckpointError:
        if tokenizer:
            raise
    if not stored:
        weights = _in_memory(weights, folder)
    params = nest({name: np.asanyarray(value) for name, value in weights.items()})
    mapped = {Path(str(x.filename)) for x in flatten(params).values() if isinstance(x, np.memmap)}
    return Model(
        config, params, words, hub.name_of(folder), partial(check_files, {path: state(path) for path in mapped})
    )


def check_files(before: Mapping[Path, Any]) -> None:
    """Raise CheckpointError if a mapped file has changed, since later results may be wrong."""
    for path, known in before.items():
        if state(path) != known:
            raise CheckpointError(f"{path}: was changed while it was in use; saving and answering stopped: start again")


def open_model(folder: Path) -> tuple[dict[str, Any], Config, Mapping[str, Any]]:
    """Return the raw config, the Config, and the weights as views or lazy arrays."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory; expected a Hugging Face model directory")
    if is_t5x(folder):
        raw, weights = t5x.open_t5x(folder)
        return raw, parse_config(raw), weights
    if not (folder / "config.json").exists():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise CheckpointError(f"{folder}: has no config.json, so it is not a model directory; found {found}")
    raw, config = read_json(folder / "config.json"), read_config(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.exists():
        read_config(generation, check_generation)
    stored, files = stored_weights(folder)
    if not config.tied_head and "lm_head.weight" not in stored and raw.get("tie_word_embeddings", True):
        config = replace(config, tied_head=True)  # transformers 5 writes such models: tied, but without scaling
    return raw, config, fitted(folder, config, stored, files)


def is_t5x(folder: Path) -> bool:
    """Return whether a folder is a step of a T5X checkpoint. Raises CheckpointError if it contains such folders."""
    if (folder / "config.json").exists():
        return False
    steps = [path.parent for path in folder.glob("checkpoint_*/checkpoint")]
    if steps:
        last = max(steps, key=lambda path: (len(path.name), path))
        raise CheckpointError(f"{folder}: contains T5X checkpoints; name one of them, for example {last}")
    return (folder / "checkpoint").is_file()


def read_tokenizer(path: Path, config: Config) -> Tokenizer:
    """Read the tokenizer of a folder or a file. Raises CheckpointError if it does not match the model."""
    try:
        words = tokenizer.load(path)
    except FileNotFoundError as error:
        hint = "T5X checkpoints have no tokenizer; add spiece.model, or use `tinyprompt convert ... --tokenizer PATH`"
        raise CheckpointError(f"{error}; {hint}" if path.is_dir() and is_t5x(path) else str(error)) from None
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if len(words) > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {len(words)} pieces, but config.json says vocab_size {config.vocab_size}"
        )
    return words


def convert(source: str | Path, out: str | Path, tokenizer: str | Path | None = None) -> Path:
    """Write a model as a Hugging Face directory that transformers can load. The write is atomic.

    Weights keep their dtype and their bits, and are written once each. config.json is copied from the source, with
    tie_word_embeddings corrected if necessary. transformers 5 scales the logits of every UMT5 by d_model ** -0.5, even
    if the head is not tied. transformers 4, T5X and tinyprompt do not, and no config.json can prevent it.

    Args:
        source: A model as in `load`.
        out: The folder to write.
        tokenizer: A file or folder with the tokenizer. The default is the tokenizer of the source.

    Raises:
        CheckpointError: The source or the tokenizer cannot be used, or `out` is not empty.
    """
    source, out = hub.find(source), Path(out).resolve()
    if out.suffix in (".safetensors", ".npy", ".npz", ".bin"):
        raise CheckpointError(f"{out}: expected the name of a folder for the model; found a file name")
    words = source if tokenizer is None else Path(tokenizer)
    check_new(out, "model")
    raw, config, weights = open_model(source)
    read_tokenizer(words, config)
    if raw.get("tie_word_embeddings", True) is not config.tied_head:
        raw["tie_word_embeddings"] = config.tied_head
    copies = {name: words / name for name in TOKENIZER_FILES}
    if words.is_file():
        copies = {"tokenizer.json" if words.suffix == ".json" else "spiece.model": words}
    copies["generation_config.json"] = source / "generation_config.json"
    files: dict[str, Content] = {name: path for name, path in copies.items() if path.exists()}
    files["config.json"] = (json.dumps(raw, indent=2) + "\n").encode()
    files["model.safetensors"] = safetensors.dump(weights, {"format": "pt"})
    write_folder(out, files)
    return out


def read_config(path: Path, parse: Callable[[dict[str, Any]], Any] = parse_config) -> Any:
    """Parse a config.json. Raises CheckpointError that names the key."""
    try:
        return parse(read_json(path))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _in_memory(weights: Mapping[str, Any], folder: Path) -> Flat:
    """Prepare stored weights for computation: narrow 64 bits, and widen 16 bits in small models. All are read-only."""
    arrays: Flat = {name: np.asanyarray(value) for name, value in weights.items()}
    arrays = {name: x.astype(np.float32) if x.dtype == np.float64 else x for name, x in arrays.items()}
    if sum(value.nbytes for value in arrays.values() if value.dtype.itemsize == 2) <= WIDEN:
        arrays = {name: ops.widen(value) for name, value in arrays.items()}
    total = sum(value.nbytes for value in arrays.values())
    if total <= COPY:  # because a mapped file that is truncated ends the process
        arrays = {name: np.array(value) for name, value in arrays.items()}
    for name, value in arrays.items():
        if total <= WIDEN and not np.isfinite(value).all():
            raise CheckpointError(f"{folder}: key {name!r} contains NaN or infinity; download or convert it again")
        if value.flags.writeable:
            arrays[name] = freeze(value)
    return arrays


def stored_weights(folder: Path) -> tuple[Flat, dict[str, Path]]:
    """Return all weights of a directory as views of its files, in a flat dict, and the file of each weight."""
    stored: Flat = {}
    files: dict[str, Path] = {}
    for path in weight_files(folder):
        mapped = safetensors.map_tensors(path) if path.suffix == ".safetensors" else torch_bin.map_pickle(path)
        for name, value in mapped.items():
            if name in stored:
                raise CheckpointError(f"{path}: key {name!r} is also in {files[name].name}")
            stored[name], files[name] = value, path
    return stored, files


def fitted(folder: Path, config: Config, stored: Flat, files: dict[str, Path]) -> Flat:
    """Match stored weights with the names and shapes of a Config. Copies of the embedding table are merged."""
    schema, tables = weight_shapes(config), [*TABLES, *(["lm_head.weight"] if config.tied_head else [])]
    tables = [name for name in tables if name in stored]
    if tables and "shared.weight" not in stored:
        stored["shared.weight"], files["shared.weight"] = stored[tables[0]], files[tables[0]]
    for name in tables:
        if not np.array_equal(stored[name], stored["shared.weight"], equal_nan=True):
            advice = "a T5 has one table for both stacks"
            if name == "lm_head.weight":
                advice = "but config.json says tie_word_embeddings is true; set it to false for a T5 1.1 model"
            raise CheckpointError(f"{files[name]}: key {name!r} differs from 'shared.weight'; {advice}")
        del stored[name]
    for name, shape in schema.items():
        if name not in stored:
            longer = next((other for other in stored if other.endswith(f".{name}")), None)
            advice = f"expected shape {list(shape)}"
            if longer:
                advice = f"names begin with {longer.removesuffix(name)!r}, as in a wrapped model; save the inner model"
            raise CheckpointError(f"{folder}: key {name!r} is missing; {advice}")
        if stored[name].shape != shape:
            found = list(stored[name].shape)
            raise CheckpointError(f"{files[name]}: key {name!r} has shape {found}, config.json implies {list(shape)}")
    for name in stored:
        if name not in schema and name != LEFTOVER:
            raise CheckpointError(f"{files[name]}: key {name!r} is not a weight of the model in config.json")
    return {name: stored[name] for name in schema}


def weight_files(folder: Path) -> list[Path]:
    """Return the weight file, or the shards of an index. safetensors are preferred to files of torch.save."""
    for name in WEIGHTS:
        index, whole = folder / f"{name}.index.json", folder / name
        if whole.exists():  # like transformers, because an index beside it may be outdated
            return [whole]
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
                raise CheckpointError(f"{index}: key 'weight_map' is missing; expected a map of names to files")
            for shard in shards.values():
                if shard in ("", ".", "..") or any(sign in shard for sign in "/\\\0"):
                    raise CheckpointError(f"{index}: key 'weight_map': expected files beside it, found {shard!r}")
            return [folder / name for name in sorted(set(shards.values()))]
    wanted = ", ".join(f"{name}.index.json, {name}" for name in WEIGHTS)
    raise CheckpointError(f"{folder}: no weights: no such file as {wanted}; download one of these")
