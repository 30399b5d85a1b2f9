"""Files of frozen models: Hugging Face directories."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16
from safetensors import SafetensorError, safe_open

from tinyprompt import hub, ops, t5, tokenizer
from tinyprompt.hub import CheckpointError
from tinyprompt.tree import Flat, Tree, flatten, nest

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": bfloat16}
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
    """Directory of the T5 that the package carries: beside the source in a checkout, inside an installed wheel."""
    here = Path(__file__).parent
    for folder in (here.parent / "weights" / "tinyprompt-t5", here / "weights" / "tinyprompt-t5"):
        if folder.is_dir():
            return folder
    raise CheckpointError(f"{here}: the built-in model is missing; reinstall tinyprompt or name a model directory")


def load(folder: str | Path | None = None, stored: bool = False) -> Model:
    """Open a Hugging Face T5 directory, or a pulled model by name: config.json, safetensors (or shards), tokenizer.

    Weights stay in the file (memory-mapped). Everything is computed in float32; of 16-bit weights, up to 1 GiB
    are widened at once, which is faster; of more, each is widened where it is used, which takes memory for one only.
    stored: all weights are the mapped ones, whatever their size.
    Without an argument: the model that the package carries.
    Raises CheckpointError that names the file and the key.
    """
    folder = hub.find(folder) if folder is not None else default_model()
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory; expected a Hugging Face model directory")
    config = read_config(folder / "config.json")
    params = nest((map_weights if stored else read_weights)(folder, config))
    try:
        words = tokenizer.load(folder)
    except (ValueError, FileNotFoundError) as error:
        raise CheckpointError(str(error)) from None
    if len(words) > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(words)} pieces, but config.json says vocab_size {config.vocab_size}"
        )
    return Model(config, params, words, hub.name_of(folder))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except ValueError as error:
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


def read_weights(folder: Path, config: t5.Config) -> Flat:
    """All weights of a directory, flat, checked; in float32, or as stored where they are many (see `load`)."""
    weights = map_weights(folder, config)
    if sum(value.nbytes for value in weights.values() if value.dtype.itemsize == 2) <= WIDEN:
        weights = {name: ops.widen(value) for name, value in weights.items()}
    for value in weights.values():
        value.flags.writeable = False
    return weights


def map_weights(folder: Path, config: t5.Config) -> Flat:
    """All weights of a directory, flat, as views of its files, checked against the schema of the configuration."""
    stored: Flat = {}
    files: dict[str, Path] = {}
    for path in weight_files(folder):
        for name, value in map_safetensors(path).items():
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
    """model.safetensors, or the shards that model.safetensors.index.json lists."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{index}: key 'weight_map' is missing; expected a map of names to files")
        return [folder / name for name in sorted(set(shards.values()))]
    return [folder / "model.safetensors"]


def map_safetensors(path: Path) -> Flat:
    """Every tensor of a safetensors file as a read-only view of the mapped file.

    The safetensors package copies each tensor into memory; a view costs nothing until it is read.
    Format: 8 bytes of header length, a JSON header, then the data.
    Raises CheckpointError for a file that is cut short or no safetensors file.
    """
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
