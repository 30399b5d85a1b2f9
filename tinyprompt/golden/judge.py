"""Compare results with the suite, and report the first array that differs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyprompt.check.ledger import distance
from tinyprompt.config import EOS
from tinyprompt.errors import CheckpointError
from tinyprompt.files import io, safetensors
from tinyprompt.golden import suite
from tinyprompt.tree import Flat

# Limits of relative errors: the norm of the difference over the norm of the expected values. Ids must be equal.
LIMITS = {np.dtype(np.float64): 1e-9, np.dtype(np.float32): 1e-4}
ROUGH = 0.1  # in 16 bits
FIRST = 5  # number of names on a line


class Fault(NamedTuple):
    """A wrong array and the reason."""

    name: str
    told: str


class Verdict(NamedTuple):
    """The result of the comparison of one file."""

    file: str
    faults: list[Fault]  # in the order of computation; unknown names at the end
    right: int
    worst: float  # largest relative error of the correct arrays
    missing: list[str]  # names of the arrays that are not in the file; they may be missing

    def __str__(self) -> str:
        lines = [f"{self.file}: right: {self.right} arrays, relative error at most {self.worst:.1e}"]
        if self.faults:
            first, others = self.faults[0], [name for name, _ in self.faults[1:]]
            lines = [f"{self.file}: WRONG: first {first.name}: {first.told}"]
            lines += [f"  also wrong: {some(others)}"] if others else []
            lines += [f"  right: {self.right} arrays"]
        return "\n".join([*lines, *([f"  not given: {some(self.missing)}"] if self.missing else [])])


class Report(NamedTuple):
    """The result of the comparison of a folder."""

    verdicts: list[Verdict]

    @property
    def ok(self) -> bool:
        return not any(verdict.faults for verdict in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        found = [
            verdict._asdict() | {"faults": [fault._asdict() for fault in verdict.faults]} for verdict in self.verdicts
        ]
        return {"ok": self.ok, "files": found}

    def __str__(self) -> str:
        return "\n".join([*map(str, self.verdicts), "verdict: " + ("right" if self.ok else "WRONG")])


def some(names: list[str]) -> str:
    """Format the number of names and the first few."""
    return f"{len(names)} arrays: {', '.join(names[:FIRST])}{', ...' if len(names) > FIRST else ''}"


def judge(theirs: Path, folder: Path | None = None) -> Report:
    """Compare files CASE/BATCH.safetensors with the files of a suite.

    Args:
        theirs: A folder. Files, and arrays of a file, may be missing.
        folder: The folder of the suite. By default, the suite is computed.

    Raises:
        CheckpointError: A file cannot be read, the folder has no files of the suite, or the versions differ.
    """
    found = sorted(path.relative_to(theirs).as_posix() for path in theirs.rglob("*.safetensors"))
    wanted = [f"{case}/{kind}.safetensors" for case in suite.FAMILIES for kind in suite.MASKS]
    inputs = {f"{name}.safetensors" for name in ("model", *map(suite.input_of, suite.MASKS))}
    unknown = [name for name in found if name not in wanted and Path(name).name not in inputs]
    if not set(found) & set(wanted):
        expected = f"expected files such as {wanted[0]}, with the names of the suite"
        raise CheckpointError(f"{theirs}: {expected}; found {', '.join(found[:FIRST]) or 'no .safetensors file'}")
    files = suite.files() if folder is None else Stored(folder)
    verdicts = [judge_file(theirs, name, files) for name in wanted if name in found]
    told = f"is not a file of the suite; expected CASE/BATCH.safetensors, such as {wanted[0]}"
    return Report([*verdicts, *(Verdict(name, [Fault(name, told)], 0, 0.0, []) for name in unknown)])


class Stored(dict[str, bytes]):
    """The files of a written suite, read on first access. Raises CheckpointError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, name: str) -> bytes:
        return io.read(self.folder / name, io.LARGEST)


def judge_file(theirs: Path, name: str, files: Mapping[str, bytes]) -> Verdict:
    """Compare one file with the suite."""
    case, kind = name.removesuffix(".safetensors").split("/")
    index = json.loads(files[f"{case}/index.json"])
    if index.get("golden") != suite.VERSION:
        told = f"the suite has version {index.get('golden')}, but this program expects version {suite.VERSION}"
        raise CheckpointError(f"{case}/index.json: {told}; write it again with: tinyprompt golden DIR")
    right, inputs = (read(Path(part), files[part]) for part in (name, f"{case}/{suite.input_of(kind)}.safetensors"))
    found, mask = read(theirs / name), inputs["attention_mask"]
    mask = np.concatenate([np.ones((len(mask), len(inputs.get("prompt", ()))), mask.dtype), mask], 1)
    faults, errors = [], []
    order = [one for one in index["order"][kind] if one in found]
    for one in order:
        fault, error = compare(found[one], right[one], mask if one.startswith("encoder.") else None)
        if fault:
            faults.append(Fault(one, fault))
        else:
            errors.append(error)
    faults += [Fault(one, "is not an array of the suite; see index.json") for one in found if one not in right]
    missing = [one for one in index["order"][kind] if one not in found]
    return Verdict(name, faults, len(errors), max(errors, default=0.0), missing)


def compare(found: np.ndarray, right: np.ndarray, mask: np.ndarray | None) -> tuple[str | None, float]:
    """Return the reason why an array is wrong, or None, and its relative error.

    mask: (B, S), the mask of the encoder. Padding in arrays (B, S, D) or (B, H, S, S) is not compared.
    """
    if found.shape != right.shape:
        return f"shape {list(found.shape)}, expected {list(right.shape)}", np.inf
    limit, exact = LIMITS.get(found.dtype, ROUGH), found.astype(np.float64)
    if right.dtype == np.int64:
        ended = np.cumsum(right == EOS, -1) - (right == EOS)  # tokens after the end of a text are arbitrary
        error = float(((exact != right) & (ended == 0)).mean())
        return (f"{error:.0%} of the ids differ" if error else None), error
    if mask is not None:
        seen = mask[:, :, None] if right.ndim == 3 else mask[:, None, :, None]
        exact, right = np.where(seen, exact, 0), np.where(seen, right, 0)
    if not np.isfinite(exact).all():
        return "contains NaN or infinity", np.inf
    error = distance(exact, right)
    return (f"relative error {error:.1e}, at most {limit:.0e} in {found.dtype}" if error > limit else None), error


def read(path: Path, content: bytes | None = None) -> Flat:
    """Read the arrays of a safetensors file."""
    return safetensors.read_tensors(path, content, safetensors.WITH_IDS)[0]
