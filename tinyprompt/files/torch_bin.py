"""Read tensors from a file written by torch.save (pytorch_model.bin), without torch and without running its code.

A pickle is a program: its opcodes may import and call any function. A small stack machine interprets the opcodes that
torch.save writes for a state dict. It knows six functions by name, all of which build tensors, and imports none. Any
other name is refused. The machine builds descriptions (storage, offset, shape), which become views of the file only
after the whole pickle has been read.

There are two layouts. Since torch 1.6: a zip archive with `*/data.pkl` and one uncompressed `*/data/KEY` per storage.
Before: five pickles (a magic number, the protocol, the machine, the state dict, the keys of the storages), then
each storage as an 8-byte count and its values. See torch/serialization.py; for the opcodes, see pickletools.
"""

import contextlib
import io
import math
import mmap
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16

from tinyprompt.errors import CheckpointError
from tinyprompt.files.io import read, regular
from tinyprompt.tree import Flat, freeze

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number of the layout before torch 1.6
KINDS: dict[str, type] = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": bfloat16,
    # These dtypes are not supported for weights. They are listed so that the message can name the key.
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}
FLOATS = (np.float64, np.float32, np.float16, bfloat16)
ORDERED_DICT = "collections.OrderedDict"
TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
PARAMETER = "torch._utils._rebuild_parameter"
KNOWN = {ORDERED_DICT, PARAMETER, *TENSORS, *KINDS}
NUMBERS_AND_TEXT = {"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
EXPECTED = "expected a state dict of tensors only; if you trust the file, save it as safetensors"
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class Global(NamedTuple):
    """The name of an object that a pickle imports."""

    name: str


class Storage(NamedTuple):
    """A storage: dtype, key in the file, and number of elements."""

    dtype: type
    key: str
    length: int


class Tensor(NamedTuple):
    """A view of a storage. Offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def map_pickle(path: Path) -> Flat:
    """Return every tensor of a torch state dict: a read-only view of the mapped file, or a copy if not C-contiguous.

    Raises:
        CheckpointError: The file is truncated, is not a state dict, or contains other objects than tensors.
    """
    with _errors(path), open(regular(path), "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _tensors(file, data, lambda dtype, start, shape: np.memmap(file, dtype, "r", start, shape))


def read_pickle(path: Path) -> Flat:
    """Return every tensor of a torch state dict as an array in memory. Raises CheckpointError like `map_pickle`."""
    content = read(path)

    def view(dtype: Any, start: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape)

    with _errors(path):
        return _tensors(io.BytesIO(content), content, view)


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Convert other errors to CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, OverflowError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _tensors(file: IO[bytes], data: mmap.mmap | bytes, view: Callable[..., np.ndarray]) -> Flat:
    """Return the tensors of a file. `view(dtype, start, shape)` maps an array at a byte of its content."""
    reader: Any = data if isinstance(data, mmap.mmap) else file  # neither allocates what a pickle claims
    tensors, starts = _zipped(file, data) if data[:4] == b"PK\3\4" else _legacy(reader, data)
    return {name: _array(view, tensor, starts[tensor.storage.key]) for name, tensor in tensors.items()}


def _zipped(file: IO[bytes], data: mmap.mmap | bytes) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the tensors of a zip archive, and the offset of each storage."""
    try:
        members = {member.filename: member for member in zipfile.ZipFile(file).infolist()}
    except Exception as error:  # zipfile raises many types for damaged files
        raise ValueError(f"a zip archive that is damaged or cut short; download it again ({error})") from None
    roots = [name.removesuffix("data.pkl") for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"a zip archive with {len(roots)} members */data.pkl; expected one, as torch.save writes it")
    root = roots[0]

    def span(name: str) -> tuple[int, int]:
        """Return the first and last byte of a member."""
        if root + name not in members:
            raise ValueError(f"member {root + name!r} is missing; download it again")
        member = members[root + name]
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise ValueError(f"member {root + name!r} is compressed or encrypted; expected it stored, as torch does")
        head = member.header_offset
        local = data[head : head + 30] if head >= 0 else b""
        if local[:4] != b"PK\3\4" or len(local) < 30:
            raise ValueError(f"member {root + name!r} is not at its offset in the directory; download it again")
        start = head + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        if start + member.file_size > len(data):
            raise ValueError(f"cut short: member {root + name!r} ends at byte {start + member.file_size}, "
                             f"the file has {len(data)}; download it again")  # fmt: skip
        return start, start + member.file_size

    if root + "byteorder" in members and data[slice(*span("byteorder"))] != b"little":
        raise ValueError("its numbers are big-endian; expected little-endian: save it again on a little-endian machine")
    tensors = _state_dict(_unpickle(io.BytesIO(data[slice(*span("data.pkl"))])))
    starts = {}
    for name, tensor in tensors.items():
        dtype, key, count = tensor.storage
        start, end = span(f"data/{key}")
        if end - start != count * np.dtype(dtype).itemsize:
            raise ValueError(f"key {name!r}: its storage has {end - start} bytes, expected {count} numbers of "
                             f"{np.dtype(dtype).itemsize}; download it again")  # fmt: skip
        starts[key] = start
    return tensors, starts


def _legacy(file: IO[bytes], data: mmap.mmap | bytes) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the tensors of the layout before torch 1.6, and the offset of each storage."""
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError("not a file written by torch.save; download it again")
    file.seek(len(MAGIC))
    _, machine, found, keys = (_unpickle(file) for _ in range(4))
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("its numbers are big-endian; expected little-endian: save it again on a little-endian machine")
    tensors = _state_dict(found)
    owners = {tensor.storage.key: (name, tensor.storage) for name, tensor in tensors.items()}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(owners):
        raise ValueError("its list of storages does not match its tensors; download it again")
    at, starts = file.tell(), {}
    for key in keys:
        name, storage = owners[key]
        count, starts[key] = int.from_bytes(data[at : at + 8], "little"), at + 8
        at += 8 + storage.length * np.dtype(storage.dtype).itemsize
        if at > len(data):
            raise ValueError(f"cut short: key {name!r} ends at byte {at}, the file has {len(data)}; download it again")
        if count != storage.length:
            raise ValueError(f"key {name!r}: its storage has {count} numbers, expected {storage.length}")
    return tensors, starts


def _state_dict(found: Any) -> dict[str, Tensor]:
    """Check that a pickle is a dict of named tensors. Raises ValueError that names the key."""
    if not isinstance(found, dict):
        raise ValueError(f"holds a {type(found).__name__}; expected a state dict, as from model.state_dict()")
    kinds: dict[str, tuple[type, int]] = {}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"key {name!r} holds a {type(value).__name__}, not a tensor; expected only a state dict: "
                "torch.save(model.state_dict(), path)"
            )
        dtype, key, count = value.storage
        if dtype not in FLOATS:
            wanted = ", ".join(np.dtype(x).name for x in FLOATS)
            raise ValueError(f"key {name!r} has dtype {np.dtype(dtype).name}; expected one of {wanted}")
        if 0 in value.shape:
            raise ValueError(f"key {name!r} is empty (shape {list(value.shape)})")
        last = value.offset + sum((n - 1) * step for n, step in zip(value.shape, value.stride, strict=True))
        if last >= count or math.prod(value.shape) > count:
            raise ValueError(f"key {name!r} reaches beyond its storage of {count} numbers (shape {list(value.shape)})")
        if kinds.setdefault(key, (dtype, count)) != (dtype, count):
            raise ValueError(f"key {name!r} uses storage {key!r} with another dtype or length than an earlier key")
    return found


def _array(view: Callable[..., np.ndarray], tensor: Tensor, start: int) -> np.ndarray:
    """Build the array of a tensor, given the offset of its storage."""
    (dtype, _, count), offset, shape, stride = tensor
    size = np.dtype(dtype).itemsize
    stride = tuple(step if n > 1 else 0 for n, step in zip(shape, stride, strict=True))
    dense = tuple(math.prod(shape[i + 1 :]) if n > 1 else 0 for i, n in enumerate(shape))
    if stride == dense:
        return view(dtype, start + offset * size, shape)
    storage = view(dtype, start, (count,))
    copy = np.lib.stride_tricks.as_strided(storage[offset:], shape, [step * size for step in stride]).copy()
    return freeze(copy)


def _unpickle(file: Any) -> Any:
    """Interpret the pickle at the position of a file. Raises ValueError for opcodes that torch.save never writes."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    argument: Any

    def pop(count: int) -> list[Any]:
        if not 0 <= count <= len(stack):
            raise ValueError("its pickle is damaged; download it again")
        items = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return items

    try:
        for opcode, argument, _ in pickletools.genops(file):
            name = opcode.name
            items = pop(len(stack) - marks.pop()) if name in ("TUPLE", "APPENDS", "SETITEMS") else []
            match name:
                case "PROTO":
                    pass
                case "MARK":
                    marks.append(len(stack))
                case "EMPTY_DICT" | "EMPTY_LIST":
                    stack.append({} if name == "EMPTY_DICT" else [])
                case "EMPTY_TUPLE" | "TUPLE":
                    stack.append(tuple(items))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack.append(tuple(pop(int(name[-1]))))
                case _ if name in CONSTANTS:
                    stack.append(CONSTANTS[name])
                case _ if name in NUMBERS_AND_TEXT:
                    stack.append(argument)
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "APPEND" | "APPENDS":
                    items = items or pop(1)
                    _only(list, stack[-1], name).extend(items)
                case "SETITEM" | "SETITEMS":
                    items = items or (pop(2) if name == "SETITEM" else [])
                    names = [_only(str, key, name) for key in items[::2]]
                    _only(dict, stack[-1], name).update(zip(names, items[1::2], strict=True))
                case "BUILD":  # of an OrderedDict, with the versions of the modules
                    pop(1)
                    _only(dict, stack[-1], name)
                case "GLOBAL":
                    imported = argument.replace(" ", ".")
                    if imported not in KNOWN:
                        raise ValueError(f"its pickle asks for {imported!r:.80}; {EXPECTED}")
                    stack.append(Global(imported))
                case "BINPERSID":
                    stack.append(_storage(*pop(1)))
                case "REDUCE":
                    stack.append(_call(*pop(2)))
                case "STOP":
                    return pop(1)[0]
                case _:
                    what = f"{name} {argument!r:.80}" if argument is not None else name
                    raise ValueError(f"its pickle has the opcode {what}; {EXPECTED}")
    except (IndexError, KeyError):
        raise ValueError("its pickle is damaged; download it again") from None


def _only(kind: type, value: Any, opcode: str) -> Any:
    """Check the type of a value exactly. Raises ValueError."""
    if type(value) is not kind:
        raise ValueError(f"its pickle has the opcode {opcode} with a {type(value).__name__}; {EXPECTED}")
    return value


def _storage(value: Any) -> Storage:
    """Resolve a persistent id: ("storage", class, key, device, length), and before torch 1.6 a view."""
    match value:
        case ("storage", Global(name), str(key), str(), int(count)) | (
            "storage", Global(name), str(key), str(), int(count), None,
        ) if name in KINDS and count >= 0:  # fmt: skip
            return Storage(KINDS[name], key, count)
    raise ValueError(f"its pickle has a persistent id that is not a storage; {EXPECTED}")


def _call(function: Any, arguments: Any) -> Any:
    """Evaluate a known function."""
    match function, arguments:
        case Global(name), () if name == ORDERED_DICT:
            return {}
        case Global(name), (Tensor() as tensor, bool(), *_) if name == PARAMETER:
            return tensor
        case Global(name), (Storage() as storage, int(offset), tuple(shape), tuple(stride)) | (
            Storage() as storage, int(offset), tuple(shape), tuple(stride), bool(), dict(),
        ) if name in TENSORS and len(shape) == len(stride):  # fmt: skip
            if all(type(n) is int and n >= 0 for n in (offset, *shape, *stride)):
                return Tensor(storage, offset, shape, stride)
    called = function.name if isinstance(function, Global) else f"a {type(function).__name__}"
    raise ValueError(f"its pickle calls {called} with unexpected arguments; {EXPECTED}")
