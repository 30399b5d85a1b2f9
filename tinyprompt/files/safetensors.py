"""Safetensors files, memory-mapped when read, and written tensor by tensor.

The safetensors package copies each tensor into memory; a view costs nothing until it is read.
Format: 8 bytes of header length, a JSON header, then the data.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from safetensors import SafetensorError, safe_open

from tinyprompt.errors import CheckpointError
from tinyprompt.files.io import regular
from tinyprompt.tree import Flat

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": bfloat16}


def dump(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file in parts. Each tensor is read when it is needed.

    tensors: arrays, or objects with a shape and a dtype that become one. Wide ones come first, so that all are aligned.
    Raises CheckpointError that names the key for a dtype that `map_tensors` does not read.
    """
    kinds = {np.dtype(dtype): kind for kind, dtype in DTYPES.items()}
    dtypes = {name: tensors[name].dtype.newbyteorder("=") for name in tensors}
    names = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        shape, dtype = tensors[name].shape, dtypes[name]
        if dtype not in kinds:
            raise CheckpointError(f"key {name!r} has dtype {dtype}; expected one of {', '.join(map(str, kinds))}")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kinds[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield np.ascontiguousarray(tensors[name], dtypes[name]).view(np.uint8).data


def map_tensors(path: Path) -> Flat:
    """Return every tensor of a safetensors file as a read-only view of the mapped file.

    Raises CheckpointError for a file that is cut short or no safetensors file.
    """
    try:
        with safe_open(regular(path), "numpy"):  # checks that the header is sound and its tensors fill the file
            pass
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
    """Name the first key that a truncated safetensors file does not contain."""
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
