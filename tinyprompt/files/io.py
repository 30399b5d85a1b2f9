"""Files of any kind: written whole or not at all, and JSON objects read."""

import contextlib
import filecmp
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tinyprompt.errors import CheckpointError

Content = bytes | Iterable[bytes | memoryview] | Path  # of a file: whole, in parts, or that of another


def is_there(path: Path, source: Path) -> bool:
    """Whether a path is the source itself or a copy; a link to it is not, for it might lead out of the folder."""
    if path.is_symlink() or not path.is_file():
        return False
    return path.samefile(source) or filecmp.cmp(path, source, shallow=False)


def write(files: Mapping[Path, Content]) -> None:
    """Write bytes, and copy files that are not there already: each whole under a name of its own, then all in place.

    If it fails, what is new is taken away: parts of files, files that replace none, folders.
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
            with open(part, "xb") as file:  # "x": never a file or a link that is there
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
    except BaseException:
        remove([*new, *parts])
        raise


def write_folder(folder: Path, files: Mapping[str, Content]) -> None:
    """Write a folder that is not there, or empty, with some files: with all of them, or not at all."""
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


def part_of(path: Path) -> Path:
    """A name beside a path for what is not finished, which nobody can guess."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def missing_folders(folder: Path) -> list[Path]:
    """A folder and those around it, as far as they are not there, the outermost first."""
    return [path for path in (*reversed(folder.parents), folder) if not path.exists()]


def remove(paths: Iterable[Path]) -> None:
    """Remove files and empty folders, the last one first; leave what is not there, or cannot be removed."""
    for path in reversed(list(paths)):
        with contextlib.suppress(OSError):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()


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
