"""Files of any kind: written whole or not at all, and JSON objects read."""

import filecmp
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tinyprompt.errors import CheckpointError


def is_there(path: Path, source: Path) -> bool:
    """Whether a path is the source itself or a copy; a link to it is not, for it might lead out of the folder."""
    if path.is_symlink() or not path.is_file():
        return False
    return path.samefile(source) or filecmp.cmp(path, source, shallow=False)


def write(files: Mapping[Path, bytes | Iterable[bytes] | Path]) -> None:
    """Write bytes, and copy files that are not there already: each whole under a name of its own, then all in place."""
    parts: dict[Path, Path] = {}
    try:
        for path, content in files.items():
            if isinstance(content, Path) and is_there(path, content):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
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
