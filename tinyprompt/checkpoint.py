"""Files of frozen models: Hugging Face directories, and T5X checkpoints."""

import filecmp
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16
from safetensors import SafetensorError, safe_open

from tinyprompt import hub, ops, pickles, t5, t5x, tokenizer
from tinyprompt.tree import CheckpointError, Flat, Tree, flatten, nest

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": bfloat16}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first one that is there, whole or as shards
TOKENIZER_FILES = (
    "tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
WIDEN = 2**30  # bytes of 16-bit weights up to which they are widened once; more stay in the file
# Copies of other weights, or leftovers that transformers ignores too; a checkpoint may hold them.
REDUNDANT = {
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
}


class Model(NamedTuple):
    """A frozen model: the configuration, the weights by their checkpoint names, the tokenizer."""

    config: t5.Config
    params: Tree
    tokenizer: tokenizer.Tokenizer
    name: str

    def fingerprint(self) -> str:
        """sha256 over all names, shapes, dtypes and values of the weights, 16 bits widened (hexadecimal)."""
        digest = hashlib.sha256()
        for name, value in sorted(flatten(self.params).items()):
            value = ops.widen(value)
            digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
            digest.update(np.ascontiguousarray(value).data)
        return digest.hexdigest()


def default_model() -> Path:
    """Directory of the T5 that the package carries: the built-in size "base"."""
    return hub.built_in("base")


def load(folder: str | Path | None = None, stored: bool = False) -> Model:
    """Open a T5: a Hugging Face directory, a T5X checkpoint, or a built-in or pulled model by its name.

    Weights stay in the file (memory-mapped). Everything is computed in float32; of 16-bit weights, up to 1 GiB
    are widened at once, which is faster; of more, each is widened where it is used, which takes memory for one only.
    stored: all weights are as stored, whatever their size. Those of T5X are read into memory in any event.
    folder: a path, a built-in size ("tiny", "small" or "base"), or a pulled model; "base" without one.
    Raises CheckpointError that names the file and the key.
    """
    folder = hub.find(folder) if folder is not None else default_model()
    _, config, weights = open_model(folder)
    words = read_tokenizer(folder, config)
    if not stored:
        weights = _in_memory(weights)
    params = nest({name: np.asanyarray(value) for name, value in weights.items()})
    return Model(config, params, words, hub.name_of(folder))


def open_model(folder: Path) -> tuple[dict[str, Any], t5.Config, Mapping[str, Any]]:
    """What config.json holds, or would hold, the configuration, and the weights: views of files, or read when used."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory; expected a Hugging Face model directory")
    if is_t5x(folder):
        raw, weights = t5x.open_t5x(folder)
        return raw, t5.Config.from_dict(raw), weights
    config = read_config(folder / "config.json")
    return read_json(folder / "config.json"), config, map_weights(folder, config)


def is_t5x(folder: Path) -> bool:
    """Whether a folder is one step of a T5X checkpoint. Raises CheckpointError where such folders lie in it."""
    if (folder / "config.json").exists():
        return False
    steps = [path.parent for path in folder.glob("checkpoint_*/checkpoint")]
    if steps:
        last = max(steps, key=lambda path: (len(path.name), path))
        raise CheckpointError(f"{folder}: holds T5X checkpoints; name one of them, for example {last}")
    return (folder / "checkpoint").is_file()


def read_tokenizer(path: Path, config: t5.Config) -> tokenizer.Tokenizer:
    """The tokenizer of a folder, or of a file. Raises CheckpointError where it does not belong to the model."""
    try:
        words = tokenizer.load(path)
    except FileNotFoundError as error:
        hint = "T5X checkpoints carry none; put spiece.model there, or use `tinyprompt convert ... --tokenizer PATH`"
        raise CheckpointError(f"{error}; {hint}" if path.is_dir() and is_t5x(path) else str(error)) from None
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if len(words) > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {len(words)} pieces, but config.json says vocab_size {config.vocab_size}"
        )
    return words


def convert(source: str | Path, out: str | Path, tokenizer: str | Path | None = None) -> Path:
    """Write a model that `load` reads as a Hugging Face directory that transformers loads, whole or not at all.

    Weights keep their dtype and their bits, each one once. config.json is the source's own, but for a wrong
    tie_word_embeddings. tokenizer: a file or a folder to take the tokenizer from, in place of the source.
    transformers 5 scales the logits of every UMT5 by d_model ** -0.5, also where the head is not tied, as
    transformers 4, T5X and tinyprompt do not: no config.json can prevent it.
    Raises CheckpointError for an unusable source or tokenizer, or where `out` holds something.
    """
    source, out = hub.find(source), Path(out).resolve()
    if out.suffix in (".safetensors", ".npy", ".npz", ".bin"):
        raise CheckpointError(f"{out}: a model is written to a folder; found the name of a file")
    words = source if tokenizer is None else Path(tokenizer)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: is there and not empty; name a new folder for the model")
    raw, config, weights = open_model(source)
    read_tokenizer(words, config)
    if raw.get("tie_word_embeddings", True) is not config.tied_head:
        raw["tie_word_embeddings"] = config.tied_head
    copies = {name: words / name for name in TOKENIZER_FILES}
    if words.is_file():
        copies = {"tokenizer.json" if words.suffix == ".json" else "spiece.model": words}
    copies["generation_config.json"] = source / "generation_config.json"
    part = out.with_name(out.name + ".part")
    try:
        part.mkdir(parents=True)
    except FileExistsError:
        raise CheckpointError(f"{part}: is left from a conversion that was stopped; remove it") from None
    try:
        (part / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        for name, path in copies.items():
            if path.exists():
                shutil.copyfile(path, part / name)
        save_safetensors(weights, part / "model.safetensors")
        if out.exists():
            out.rmdir()
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def save_safetensors(weights: Mapping[str, Any], path: Path) -> None:
    """Write arrays as a safetensors file for transformers, one by one: each is read when its turn has come."""
    kinds = {np.dtype(dtype): kind for kind, dtype in DTYPES.items()}
    names = sorted(weights, key=lambda name: (-weights[name].dtype.itemsize, name))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        shape, dtype = weights[name].shape, weights[name].dtype
        start, at = at, at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kinds[dtype], "shape": shape, "data_offsets": [start, at]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            np.ascontiguousarray(weights[name]).tofile(file)


def is_there(path: Path, source: Path) -> bool:
    """Whether a path is the source itself or a copy; a link to it is not, for it might lead out of the folder."""
    if path.is_symlink() or not path.is_file():
        return False
    return path.samefile(source) or filecmp.cmp(path, source, shallow=False)


def write(files: Mapping[Path, bytes | Path]) -> None:
    """Write bytes, and copy files that are not there already: each whole under another name, then all in place."""
    parts: dict[Path, Path] = {}
    try:
        for path, content in files.items():
            if isinstance(content, Path) and is_there(path, content):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".part")
            parts[part] = path
            if isinstance(content, Path):
                shutil.copyfile(content, part)
            else:
                part.write_bytes(content)
        for part, path in parts.items():
            os.replace(part, path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_config(path: Path) -> t5.Config:
    """The model configuration of a config.json. Raises CheckpointError that names the key."""
    try:
        return t5.Config.from_dict(read_json(path))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _in_memory(weights: Mapping[str, Any]) -> Flat:
    """Weights to compute with: 64 bits narrowed, 16 widened unless they are many; none can be written."""
    arrays: Flat = {name: np.asanyarray(value) for name, value in weights.items()}
    arrays = {name: x.astype(np.float32) if x.dtype == np.float64 else x for name, x in arrays.items()}
    if sum(value.nbytes for value in arrays.values() if value.dtype.itemsize == 2) <= WIDEN:
        arrays = {name: ops.widen(value) for name, value in arrays.items()}
    for value in arrays.values():
        value.flags.writeable = False
    return arrays


def map_weights(folder: Path, config: t5.Config) -> Flat:
    """All weights of a directory, flat, as views of its files, checked against the schema of the configuration."""
    stored: Flat = {}
    files: dict[str, Path] = {}
    for path in weight_files(folder):
        mapped = map_safetensors(path) if path.suffix == ".safetensors" else pickles.map_pickle(path)
        for name, value in mapped.items():
            if name in stored:
                raise CheckpointError(f"{path}: key {name!r} is also in {files[name].name}")
            stored[name], files[name] = value, path
    schema = t5.shapes(config)
    alias = next((k for k in sorted(REDUNDANT) if k in stored and k.endswith("embed_tokens.weight")), None)
    if "shared.weight" not in stored and alias:
        stored["shared.weight"], files["shared.weight"] = stored[alias], files[alias]
    head = stored.pop("lm_head.weight", None) if config.tied_head else None
    if head is not None and not np.array_equal(head, stored.get("shared.weight", head)):
        raise CheckpointError(
            f"{files['lm_head.weight']}: key 'lm_head.weight' differs from 'shared.weight', "
            "but config.json says tie_word_embeddings is true; set it to false for a T5 1.1 model"
        )
    for name, shape in schema.items():
        if name not in stored:
            raise CheckpointError(f"{folder}: key {name!r} is missing; expected shape {list(shape)}")
        if stored[name].shape != shape:
            found = list(stored[name].shape)
            raise CheckpointError(f"{files[name]}: key {name!r} has shape {found}, config.json implies {list(shape)}")
    for name in stored:
        if name not in schema and name not in REDUNDANT:
            raise CheckpointError(f"{files[name]}: key {name!r} is no weight of the model that config.json describes")
    return {name: stored[name] for name in schema}


def weight_files(folder: Path) -> list[Path]:
    """The file of the weights, or the shards that an index lists: safetensors, else those that torch.save wrote."""
    for name in WEIGHTS:
        index, whole = folder / f"{name}.index.json", folder / name
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
                raise CheckpointError(f"{index}: key 'weight_map' is missing; expected a map of names to files")
            for shard in shards.values():
                if shard in ("", ".", "..") or any(sign in shard for sign in "/\\\0"):
                    raise CheckpointError(f"{index}: key 'weight_map': expected files beside it, found {shard!r}")
            return [folder / name for name in sorted(set(shards.values()))]
        if whole.exists():
            return [whole]
    wanted = ", ".join(f"{name}.index.json, {name}" for name in WEIGHTS)
    raise CheckpointError(f"{folder}: no weights: no such file as {wanted}; download one of these")


def map_safetensors(path: Path) -> Flat:
    """Every tensor of a safetensors file as a read-only view of the mapped file.

    The safetensors package copies each tensor into memory; a view costs nothing until it is read.
    Format: 8 bytes of header length, a JSON header, then the data.
    Raises CheckpointError for a file that is cut short or no safetensors file.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory; expected a safetensors file")
    try:
        with safe_open(path, "numpy"):  # checks that the header is sound and its tensors fill the file
            pass
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {_what_is_wrong(path)}; download it again ({error})") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    out: Flat = {}
    for name, entry in header.items():
        kind, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if kind not in DTYPES:
            raise CheckpointError(f"{path}: key {name!r} has dtype {kind}; expected one of {sorted(DTYPES)}")
        if start == end:
            raise CheckpointError(f"{path}: key {name!r} is empty (shape {list(shape)})")
        out[name] = np.memmap(path, DTYPES[kind], "r", 8 + length + start, shape)
    return out


def _what_is_wrong(path: Path) -> str:
    """Name the first key that a truncated safetensors file does not hold."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            ends = {
                name: entry["data_offsets"][1]
                for name, entry in json.loads(file.read(length)).items()
                if name != "__metadata__"
            }
        name = next(name for name, end in sorted(ends.items(), key=lambda e: e[1]) if 8 + length + end > size)
        return f"cut short: key {name!r} ends at byte {8 + length + ends[name]}, the file has {size}"
    except Exception:  # the header itself is broken: nothing better can be said
        return f"not a safetensors file, or its header is damaged ({size} bytes)"
