"""Read T5X checkpoints: a msgpack file `checkpoint` with small arrays, and a zarr directory for each large array.

Only the weights (`target`) are read. The optimizer state and a soft prompt among the weights are skipped.
T5X does not store the configuration. The sizes follow from the shapes. layer_norm_epsilon 1e-6, maximum distance 128
and the activations of the T5 family (relu, or gated gelu_new) are assumed, as in T5X's own configurations.

Formats: the msgpack specification, flax.serialization (an array is an extension of type 1), zarr specification 2.
"""

import itertools
import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from tinyprompt.config import Config, weight_shapes
from tinyprompt.errors import CheckpointError
from tinyprompt.files.config import parse_config
from tinyprompt.files.safetensors import Lazy
from tinyprompt.tree import freeze

DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": bfloat16}
DTYPES |= {"<f8": np.float64, "<f4": np.float32, "<f2": np.float16}
LAYERS = {"encoder": ("attention", "mlp"), "decoder": ("self_attention", "encoder_decoder_attention", "mlp")}
KERNELS = {"q": "query", "k": "key", "v": "value", "o": "out"}


def open_t5x(folder: Path) -> tuple[dict[str, Any], dict[str, Lazy]]:
    """Read a T5X checkpoint as a config.json dict, and weights with Hugging Face's names and orientation.

    Args:
        folder: The folder of one step, with the file `checkpoint`. Each weight is read on first use, in its dtype.

    Raises:
        CheckpointError: The checkpoint is invalid. The message names the file and T5X's name of the weight.
    """
    arrays = _arrays(folder)
    stacked = [name for name in arrays if name.startswith(("encoder.encoder.", "decoder.decoder."))]
    if stacked:
        raise CheckpointError(
            f"{folder}: {stacked[0]!r} holds all layers in one array (scan_layers); expected one array for each layer: "
            "write the checkpoint without scanned layers first"
        )
    raw = _config(folder, arrays)
    try:
        config = parse_config(raw)
    except ValueError as error:
        raise CheckpointError(f"{folder}: its shapes do not form a T5: {error}") from None
    weights: dict[str, Lazy] = {}
    for name, shape in weight_shapes(config).items():
        source = t5x_name(name, config)
        if source not in arrays:
            raise CheckpointError(f"{folder}: {source!r} is missing; expected shape {list(shape[::-1])}")
        weights[name] = _oriented(folder, source, arrays.pop(source), name, shape, config)
    for source in arrays:
        if not source.startswith("encoder.prompt."):
            raise CheckpointError(f"{folder}: {source!r} is not a weight of a T5 with {config.num_layers} layers")
    return raw, weights


def t5x_name(name: str, config: Config) -> str:
    """Return T5X's name for a Hugging Face weight name."""
    top = {"shared.weight": "token_embedder.embedding", "lm_head.weight": "decoder.logits_dense.kernel"}
    if name in top:
        return top[name]
    stack, *path, _ = name.split(".")
    if path == ["final_layer_norm"]:
        return f"{stack}.{stack}_norm.scale"
    _, i, _, j, part, *leaf = path
    kind = LAYERS[stack][int(j)]
    if part == "layer_norm":
        return f"{stack}.layers_{i}.pre_{kind.replace('encoder_decoder', 'cross')}_layer_norm.scale"
    if leaf == ["relative_attention_bias"]:
        return f"{stack}.{f'layers_{i}.' if config.bias_in_every_layer else ''}relpos_bias.rel_embedding"
    return f"{stack}.layers_{i}.{kind}.{KERNELS.get(leaf[0], leaf[0])}.kernel"


def _config(folder: Path, arrays: dict[str, Lazy]) -> dict[str, Any]:
    """Derive a config.json dict from the shapes of the weights."""

    def shape(*names: str, dims: tuple[int, ...] = (2,)) -> tuple[int, ...]:
        found = next((arrays[name].shape for name in names if name in arrays), None)
        if found is None or len(found) not in dims:
            what = "is missing" if found is None else f"has shape {list(found)}"
            raise CheckpointError(f"{folder}: {names[0]!r} {what}; expected an array of {dims[0]} dimensions")
        return found

    def depth(stack: str) -> int:
        return len({name.split(".")[1] for name in arrays if name.startswith(f"{stack}.layers_")})

    vocab_size, d_model = shape("token_embedder.embedding")
    relpos = "encoder.relpos_bias.rel_embedding"
    heads, buckets = shape(relpos, relpos.replace("relpos", "layers_0.relpos"))
    query = "encoder.layers_0.attention.query.kernel"
    _, *inner = shape(query, dims=(2, 3))
    if math.prod(inner) % heads:
        raise CheckpointError(f"{folder}: {query!r} has shape {[d_model, *inner]}; expected {heads} heads of one size")
    gated = "encoder.layers_0.mlp.wi_0.kernel" in arrays
    _, d_ff = shape("encoder.layers_0.mlp.wi_0.kernel" if gated else "encoder.layers_0.mlp.wi.kernel")
    family = "t5" if relpos in arrays else "umt5"
    return {
        "model_type": family,
        "architectures": [f"{family.upper()}ForConditionalGeneration"],
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": math.prod(inner) // heads,
        "d_ff": d_ff,
        "num_heads": heads,
        "num_layers": depth("encoder"),
        "num_decoder_layers": depth("decoder"),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": "decoder.logits_dense.kernel" not in arrays,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def _oriented(folder: Path, source: str, array: Lazy, name: str, shape: tuple[int, ...], config: Config) -> Lazy:
    """Convert a kernel to Hugging Face's orientation: transposed, with the heads merged into one dimension."""
    turned = name != "shared.weight"
    stored = shape[::-1] if turned else shape
    heads = config.num_heads, config.d_kv
    allowed = [stored]
    if ".o." in name:
        allowed.append((*heads, config.d_model))
    elif re.search(r"\.[qkv]\.", name):
        allowed.append((config.d_model, *heads))
    if array.shape not in allowed:
        wanted = " or ".join(str(list(x)) for x in allowed)
        raise CheckpointError(f"{folder}: {source!r} has shape {list(array.shape)}; expected {wanted}")

    def read() -> np.ndarray:
        value = array.read().reshape(stored)
        return np.ascontiguousarray(value.T if turned else value)

    return Lazy(shape, array.dtype, read)


def _arrays(folder: Path) -> dict[str, Lazy]:
    """Return the arrays of `target` by dotted name."""
    path = folder / "checkpoint"
    try:
        found = _unpack(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except ImportError:
        raise CheckpointError(f"{path}: reading it needs msgpack; pip install 'tinyprompt-t5[t5x]'") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a msgpack file, or cut short; download it again ({error})") from None
    for key in ("optimizer", "target"):
        if not isinstance(found, dict) or key not in found:
            raise CheckpointError(f"{path}: key {key!r} is missing; expected a T5X checkpoint: optimizer, target")
        found = found[key]
    out: dict[str, Lazy] = {}

    def walk(node: Any, name: str) -> None:
        if isinstance(node, dict) and "driver" not in node:
            for key, child in node.items():
                walk(child, f"{name}.{key}" if name else str(key))
        elif isinstance(node, tuple):
            out[name] = _ndarray(path, name, *node)
        else:
            out[name] = _zarr(folder / f"target.{name}")

    walk(found, "")
    return out


def _unpack(data: bytes) -> Any:
    """Decode msgpack. An extension becomes (type, bytes)."""
    import msgpack

    return msgpack.unpackb(data, ext_hook=lambda code, data: (code, data), strict_map_key=False)


def _ndarray(path: Path, name: str, code: int, data: bytes) -> Lazy:
    """Decode an array of the msgpack file: an extension that packs shape, dtype and values."""
    try:
        if code != 1:
            raise ValueError(f"extension {code}")
        shape, kind, values = _unpack(data)
        if kind not in DTYPES:
            raise ValueError(f"dtype {kind}")
        array = np.frombuffer(values, DTYPES[kind]).reshape(shape)
        if not array.size:
            raise ValueError(f"shape {shape}")
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {name!r} is not an array of floats ({error})") from None
    return Lazy(array.shape, array.dtype, lambda: array)


def _zarr(folder: Path) -> Lazy:
    """Open a zarr directory: `.zarray` describes the array, and `0.0`, `0.1` ... are its chunks."""
    path = folder / ".zarray"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        shape, chunks, compressor = tuple(about["shape"]), tuple(about["chunks"]), about["compressor"]
        plain = about["zarr_format"], about["order"], about.get("filters"), about.get("dimension_separator", ".")
        kind = about["dtype"]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected the zarr directory of this weight") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a valid JSON description of a zarr array ({error!r})") from None
    if compressor is not None and (not isinstance(compressor, dict) or compressor.get("id") not in ("gzip", "zlib")):
        raise CheckpointError(f"{path}: compressor {compressor}; expected gzip, zlib or none, as T5X writes them")
    if plain != (2, "C", None, "."):
        raise CheckpointError(
            f"{path}: zarr_format, order, filters, separator {plain}; expected 2, 'C', no filters, '.'"
        )
    if not isinstance(kind, str) or kind not in DTYPES:
        raise CheckpointError(f"{path}: dtype {kind}; expected one of {', '.join(DTYPES)}")
    if len(shape) != len(chunks) or not all(type(n) is int and n > 0 for n in (*shape, *chunks)):
        raise CheckpointError(f"{path}: shape {shape}, chunks {chunks}; expected as many positive numbers in both")
    dtype = np.dtype(DTYPES[kind])

    def read() -> np.ndarray:
        out = np.empty(shape, dtype)
        for at in itertools.product(*(range(-(-n // step)) for n, step in zip(shape, chunks, strict=True))):
            place = tuple(slice(i * step, (i + 1) * step) for i, step in zip(at, chunks, strict=True))
            part = out[place]
            chunk = _chunk(folder / (".".join(map(str, at)) or "0"), chunks, dtype, compressor)
            part[...] = chunk[tuple(slice(n) for n in part.shape)]
        return freeze(out)

    return Lazy(shape, dtype, read)


def _chunk(path: Path, shape: tuple[int, ...], dtype: np.dtype, compressor: dict | None) -> np.ndarray:
    """Read one chunk of a zarr array. Chunks at the edge have full size."""
    size = math.prod(shape) * dtype.itemsize
    try:
        data = path.read_bytes()
        if compressor:
            either = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # detects the header of gzip or zlib
            data = either.decompress(data, size + 1)
            if not either.eof and len(data) == size:
                raise CheckpointError(f"{path}: cut short, its checksum is missing; download it again")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a chunk of the weight is missing, download it again") from None
    except (zlib.error, OverflowError) as error:
        raise CheckpointError(f"{path}: damaged or cut short; download it again ({error})") from None
    if len(data) != size:
        raise CheckpointError(f"{path}: holds {len(data)} bytes, expected {size}; download it again")
    return np.frombuffer(data, dtype).reshape(shape)
