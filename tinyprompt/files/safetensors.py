"""Safetensors files: models are memory-mapped, prompts are read, and both are written tensor by tensor.

The safetensors package copies each tensor into memory, whereas a mapped view costs nothing until it is read. A mapped
file must not be written in place: the operating system kills a process that reads beyond its new end.
Format: 8 bytes of header length, a JSON header, then the data.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from safetensors import SafetensorError, deserialize, safe_open

from tinyprompt.errors import CheckpointError
from tinyprompt.files.io import read, regular
from tinyprompt.tree import Flat

DTYPES: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": bfloat16}
WITH_IDS = DTYPES | {"I64": np.int64, "I32": np.int32}


@dataclass(frozen=True)
class Lazy:
    """An array that is read or drawn by `np.asarray`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read() if dtype is None else self.read().astype(dtype)


def dump(
    tensors: Mapping[str, Any], metadata: Mapping[str, str], known: Mapping[str, Any] = DTYPES
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file in parts. Each tensor is converted only when it is written.

    Args:
        tensors: Arrays or `Lazy` arrays. Wide dtypes are written first, so that all tensors are aligned.
        metadata: Texts for the header.
        known: The dtypes of the format.

    Raises:
        CheckpointError: A tensor has another dtype. The message names its key.
    """
    kinds = {np.dtype(dtype): kind for kind, dtype in known.items()}
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

    Raises:
        CheckpointError: The file is truncated, or is not a safetensors file.
    """
    try:
        with safe_open(regular(path), "numpy"):  # validates the header and the file size
            pass
    except SafetensorError as error:
        with open(path, "rb") as file:
            raise _unsound(path, file.read(2**20), path.stat().st_size, error) from None
    with open(path, "rb") as file:  # opened once, so that all tensors come from the same file
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        out: Flat = {}
        for name, entry in header.items():
            shape, start = entry["shape"], 8 + length + entry["data_offsets"][0]
            with _of_key(path, name, entry["dtype"], shape) as dtype:
                out[name] = np.memmap(file, dtype, "r", start, tuple(shape))
    return out


def read_tensors(
    path: Path, content: bytes | None = None, known: Mapping[str, Any] = DTYPES
) -> tuple[Flat, dict[str, str]]:
    """Return the tensors of a safetensors file as arrays in memory, and its metadata.

    Args:
        path: The path of the file.
        content: The bytes of the file, if they have been read.
        known: The supported dtypes.

    Raises:
        CheckpointError: The file is truncated, or is not a safetensors file.
    """
    content = read(path) if content is None else content
    try:
        tensors = sorted(deserialize(content), key=lambda tensor: tensor[0])  # its order differs between calls
    except SafetensorError as error:
        raise _unsound(path, content, len(content), error) from None
    out: Flat = {}
    for name, entry in tensors:
        with _of_key(path, name, entry["dtype"], entry["shape"], known) as dtype:
            out[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return out, header.get("__metadata__") or {}


@contextlib.contextmanager
def _of_key(path: Path, name: str, kind: str, shape: list[int], known: Mapping[str, Any] = DTYPES) -> Iterator[Any]:
    """Yield the dtype of a tensor. Raises CheckpointError that names the key if NumPy does not support the tensor."""
    if kind not in known:
        raise CheckpointError(f"{path}: key {name!r} has dtype {kind}; expected one of {sorted(known)}")
    if 0 in shape:
        raise CheckpointError(f"{path}: key {name!r} is empty (shape {shape})")
    try:
        yield known[kind]
    except ValueError as error:
        told = f"has {len(shape)} dimensions and cannot be read ({error})"
        raise CheckpointError(f"{path}: key {name!r} {told}") from None


def _unsound(path: Path, start: bytes, size: int, error: Exception) -> CheckpointError:
    """Build the error for an invalid file. It names the first key that extends beyond the end of the file."""
    length = int.from_bytes(start[:8], "little")
    reason = f"not a safetensors file, or its header is damaged ({size} bytes)"
    with contextlib.suppress(Exception):  # the header is invalid as well: keep the general reason
        header = json.loads(start[8 : 8 + length])
        ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        name = next(name for name, end in sorted(ends.items(), key=lambda e: e[1]) if 8 + length + end > size)
        reason = f"cut short: key {name!r} ends at byte {8 + length + ends[name]}, the file has {size}"
    return CheckpointError(f"{path}: {reason}; download it again ({error})")
