"""Atomic writes of files and folders, and reading of JSON objects."""

import contextlib
import errno
import filecmp
import json
import os
import secrets
import shutil
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from tinyprompt.errors import CheckpointError

TORCH = "is a file of torch.save; save its vectors, float32 (P, d_model), by numpy.save(FILE, tensor.detach().numpy())"
LARGEST = 2**28  # size limit of a file that is read whole, after decompression
TRIES = 20  # attempts to read a file that changes meanwhile
Content = bytes | Iterable[bytes | memoryview] | Path  # bytes, parts, or the path of a file to copy


def is_there(path: Path, source: Path) -> bool:
    """Return whether a path is the source itself or a copy. A link is neither: it may point out of the folder."""
    if path.is_symlink() or not path.is_file():
        return False
    return path.samefile(source) or filecmp.cmp(path, source, shallow=False)


def write(files: Mapping[Path, Content]) -> None:
    """Write or copy files atomically: each under a temporary name, then all are renamed.

    If it fails, new files, temporary files and new folders are removed.
    """
    parts: dict[Path, Path] = {}
    new: list[Path] = []
    try:
        for path, content in files.items():
            if isinstance(content, Path) and is_there(path, content):
                continue
            new += missing_folders(path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = part_of(path)
            with open(part, "xb") as file:  # "x" never overwrites a file or follows a link
                parts[part] = path
                if isinstance(content, Path):
                    with open(content, "rb") as source:
                        shutil.copyfileobj(source, file)
                else:
                    file.writelines([content] if isinstance(content, bytes) else content)
                file.flush()
                os.fsync(file.fileno())
        for part, path in parts.items():
            new += [] if os.path.lexists(path) else [path]
            os.replace(part, path)
    except BaseException as error:
        remove([*new, *parts])
        # A full disk is reported without a file name, and a temporary name means nothing to the user.
        if isinstance(error, OSError) and error.errno and error.filename in (None, *map(str, parts)):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_folder(folder: Path, files: Mapping[str, Content]) -> None:
    """Write a folder, which must be missing or empty, atomically with all its files."""
    part, new = part_of(folder), missing_folders(folder.parent)
    made = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        made = True
        write({part / name: content for name, content in files.items()})
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)
    except BaseException:
        if made:
            shutil.rmtree(part, ignore_errors=True)
        remove(new)
        raise


def check_new(folder: Path, what: str) -> None:
    """Raise CheckpointError if `write_folder` cannot write `what` to a folder, which is not missing or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and is not empty; name a new folder for the {what}")


def part_of(path: Path) -> Path:
    """Return an unpredictable temporary name beside a path."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def missing_folders(folder: Path) -> list[Path]:
    """List the missing parent folders of a path, the outermost first."""
    return [path for path in (*reversed(folder.parents), folder) if not path.exists()]


def remove(paths: Iterable[Path]) -> None:
    """Remove files and empty folders in reverse order. Failures are ignored."""
    for path in reversed(list(paths)):
        with contextlib.suppress(OSError):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()


def regular(path: Path, most: int | None = None) -> Path:
    """Return the path of a regular file of at most `most` bytes. Raises CheckpointError for any other path."""
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: {'no such file' if error.errno == errno.ENOENT else error.strerror}") from None
    if stat.S_ISDIR(found.st_mode):
        raise CheckpointError(f"{path}: is a directory; expected a file")
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: is a device or a pipe; expected a file")
    if most is not None and found.st_size > most:
        raise CheckpointError(f"{path}: has {found.st_size:,} bytes; at most {most:,} are read")
    return path


def read(path: Path, most: int | None = None) -> bytes:
    """Read a regular file through one descriptor, and retry if it changes meanwhile. Raises CheckpointError."""
    regular(path, most)
    try:
        for _ in range(TRIES):
            with open(path, "rb") as file:
                before, content, after = os.fstat(file.fileno()), file.read(), os.fstat(file.fileno())
            if (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, len(content)):
                return content
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    raise CheckpointError(f"{path}: keeps changing; write to another name, then rename that file")


def state(path: Path) -> tuple[tuple[Any, ...], ...]:
    """Return a value that changes when a file, or a file of a folder, is written or replaced.

    It includes the ctime, which programs cannot set, unlike the mtime.
    """
    found = []
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with contextlib.suppress(OSError):  # deleted meanwhile, or a broken link
            about = file.stat()
            found.append((file.name, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns))
    return tuple(found)


def npy(array: np.ndarray) -> bytes:
    """Return the content of a .npy file."""
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


def load_numpy(path: Path, content: bytes | None = None) -> Any:
    """Read the array of a .npy file, or a dict of the arrays of a .npz file. Pickles and huge arrays are refused.

    Args:
        path: The path of the file.
        content: The bytes of the file, if they have been read.

    Raises:
        CheckpointError: The file is not a NumPy file, is too large, or contains Python objects.
    """
    content = read(path, LARGEST) if content is None else content
    try:
        if content.startswith(b"PK"):
            members = zipfile.ZipFile(BytesIO(content)).infolist()
            if any(member.filename.endswith("data.pkl") for member in members):
                raise CheckpointError(f"{path}: {TORCH}")
            size = sum(member.file_size for member in members)
            if size > LARGEST:
                raise CheckpointError(
                    f"{path}: contains {size:,} bytes when decompressed; at most {LARGEST:,} are read"
                )
        found = np.load(BytesIO(content), allow_pickle=False)
        return found if isinstance(found, np.ndarray) else {name: np.asarray(found[name]) for name in found}
    except CheckpointError:
        raise
    except Exception as error:  # damaged files raise many types
        reason = "not a file of NumPy arrays, or damaged; download it again"
        if "allow_pickle" in str(error) and content[:1] in (b"\x80", b"\x93", b"P"):
            reason = "contains pickled Python objects, which can run code and are never loaded; np.save float32 vectors"
        raise CheckpointError(f"{path}: {reason}") from None


@contextlib.contextmanager
def claimed(path: Path, wait: bool = False) -> Iterator[None]:
    """Lock a path against other runs during this context. The lock ends with the process.

    Args:
        path: The path to write to.
        wait: Wait while another run holds the lock.

    Raises:
        CheckpointError: Another run holds the lock, and `wait` is False.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if is_named(descriptor, lock):
                break
            if not wait:
                raise BlockingIOError
            os.close(descriptor)  # the previous run has deleted its lock file; lock the new one
        except BlockingIOError:
            os.close(descriptor)
            told = f"{path}: another run is writing this file; wait until it ends, or name another file"
            raise CheckpointError(told) from None
        except BaseException:  # for example Ctrl-C during the wait
            os.close(descriptor)
            raise
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def is_named(descriptor: int, path: Path) -> bool:
    """Return whether a path still refers to an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises CheckpointError."""
    try:
        value = json.loads(read(path, LARGEST).decode())
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
