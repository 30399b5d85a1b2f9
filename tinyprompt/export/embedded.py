"""Write a folder of C that trains a prompt: the graphs of `export` as C, a loop, and rows as ids.

emx-onnx-cgen translates the graphs. The files of `c/` are copied as they are.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tinyprompt import data
from tinyprompt.data import Row
from tinyprompt.device import version
from tinyprompt.errors import DataError, DeviceError
from tinyprompt.export import wordpiece
from tinyprompt.export.graphs import SHAPE, Export, Exported, Shape, onnx_file, score, step
from tinyprompt.files.io import Content
from tinyprompt.model import Model
from tinyprompt.tasks.reading import check_targets

LOOP = Path(__file__).parent / "c"
MAGIC = 0x31505254


def export_c(
    folder: str | Path | None,
    out: str | Path,
    shape: Shape = SHAPE,
    prompt: str | Path | None = None,
    train: Sequence[Row] = (),
    test: Sequence[Row] = (),
) -> Exported:
    """Write step.c, score.c, their weights, the programs around them, a Makefile and rows. All are written, or none.

    folder, shape, prompt: as for `export`.
    train, test: rows to learn from, and rows whose accuracy the program prints. Without any, there is no rows.bin.

    The table of the tokenizer, words.bin, is written for WordPiece only.
    Raises as `export`; DeviceError also without emx-onnx-cgen, DataError for rows that do not fit the shape.
    """
    if not version("emx-onnx-cgen"):
        raise DeviceError("export --c: emx-onnx-cgen is not installed; pip install 'tinyprompt-t5[embedded]'")
    exported = Export(folder, Path(out), shape, prompt, "inside")
    model, first = exported.model, exported.inputs["prompt"]
    files: dict[str, Content] = {path.name: path.read_bytes() for path in sorted(LOOP.iterdir())}
    if train:
        files["rows.bin"] = packed(model, shape, train, test)
        words = data.label_words(train, "classify") or ()
        files["labels.txt"] = "".join(f"{word}\n" for word in words).encode()
    if (table := wordpiece.table(model.tokenizer)) is not None:
        files["words.bin"] = table
    prototypes = []
    for function in (step, score):
        name = function.__name__
        source, weights = translated(name, onnx_file(function, exported.inputs, model, {}, plain=True))
        files |= {f"{name}.c": source.encode(), f"{name}.bin": weights}
        (prototype,) = re.findall(rf"^void {name}\(.*?\)", source, re.M)
        prototypes += [f"_Bool {name}_load(const char *path);", prototype + ";"]
    sizes = dict(zip(("BATCH", "INPUT_TOKENS", "TARGET_TOKENS"), shape[:3], strict=True))
    sizes |= dict(zip(("VECTORS", "WIDTH"), first.shape, strict=True))
    lines = ["#include <stdint.h>", *(f"#define {name} {size}" for name, size in sizes.items()), *prototypes]
    files["model.h"] = ("\n".join(lines) + "\n").encode()
    return exported.write({}, files)


def translated(name: str, graph: bytes) -> tuple[str, bytes]:
    """Translate a graph to C: the source of a function of this name, and the file of its weights.

    Raises DeviceError if the translator fails.
    """
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / f"{name}.onnx").write_bytes(graph)
        words = ["compile", "--model-name", name, "--large-weight-threshold", "1", f"{name}.onnx", f"{name}.c"]
        command = [sys.executable, "-m", "emx_onnx_cgen", *words]
        done = subprocess.run(command, cwd=made, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise DeviceError(f"export --c: emx-onnx-cgen {version('emx-onnx-cgen')} cannot translate {name}: {last}")
        source = (Path(made) / f"{name}.c").read_text(encoding="utf-8")
        # Its constants are global, and two of its files have the same names.
        return re.sub(r"\bweight(?=\d+_)", f"{name}_weight", source), (Path(made) / f"{name}.bin").read_bytes()


def packed(model: Model, shape: Shape, train: Sequence[Row], test: Sequence[Row]) -> bytes:
    """Return rows as the numbers that train.c reads. Longer inputs lose their end. Raises DataError."""
    words = data.label_words(train, "classify") or ()
    check_targets(test, words, "test rows", "add rows to learn from that have it")
    targets = list(data.target_ids(model.tokenizer, words).values())
    longest = max(map(len, targets))
    if longest > shape.target_tokens:
        advice = f"give --target-tokens {longest}, found {shape.target_tokens}"
        raise DataError(f"label words have up to {longest} tokens, with their end; {advice}")
    rows = [*train, *test]
    inputs = data.encode_inputs([row.input for row in rows], model.tokenizer, shape.input_tokens)

    def filled(ids: Sequence[int], length: int) -> list[int]:
        return [len(ids), *ids, *[0] * (length - len(ids))]

    numbers = [MAGIC, shape.input_tokens, shape.target_tokens, len(words), len(train), len(test)]
    for target in targets:
        numbers += filled(target, shape.target_tokens)
    for row, ids in zip(rows, inputs, strict=True):
        numbers += [words.index(row.target), *filled(ids, shape.input_tokens)]
    return np.array(numbers, "<i4").tobytes()
