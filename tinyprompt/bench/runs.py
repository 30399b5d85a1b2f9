"""Measure whole tuning runs of tinyprompt and PEFT. The engines alternate, each in its own process.

A run lasts from the start of Python to its last dev score. All engines share the first prompt, rows, batch size,
steps, dev scores, optimiser and learning rate. `peft_side.py` implements PEFT's side.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from tinyprompt.bench.steps import Notes, available, write_model
from tinyprompt.check.process import run_once
from tinyprompt.data import Row
from tinyprompt.errors import DataError
from tinyprompt.files import io, models, prompts
from tinyprompt.methods import METHODS, init_params
from tinyprompt.model import Prompt
from tinyprompt.settings import Settings
from tinyprompt.study.grid import Cell
from tinyprompt.tuning import run_task, task_data

RUN, FIRST = "run.json", "first.safetensors"
# Settings that PEFT's side supports: Adam, without z-loss and warm-up.
COMMON = {"method": "prompt", "optimizer": "adam", "z_loss": 0.0, "warmup_steps": 0, "dropout": 0.0, "patience": 0}
ENGINES = ("ort", "ort-int8", "peft-fp32", "peft-bf16")
MODULES = {"ort": "runs", "peft": "peft_side"}


class Run(NamedTuple):
    """A run for every engine. The engines' processes read it from a folder."""

    model: str  # the folder of the frozen model
    train: list[Row]
    dev: list[Row]
    label_words: list[str]
    settings: Settings

    @classmethod
    def read(cls, folder: Path) -> "Run":
        found = io.read_json(folder / RUN)
        parts = {part: [Row(*row) for row in found[part]] for part in ("train", "dev")}
        return cls(**found | parts | {"settings": Settings(**found["settings"])})

    def write(self, folder: Path) -> None:
        """Write the run and the first prompt, which all engines share."""
        plain = self._asdict() | {"settings": asdict(self.settings)}
        plain |= {part: [(row.input, row.target) for row in plain[part]] for part in ("train", "dev")}
        io.write({folder / RUN: json.dumps(plain).encode()})
        model = models.load(Path(self.model))
        first = init_params(model, self.settings, self.label_words)
        prompts.save_prompt(Prompt(first, model.name, None, tuple(self.label_words)), folder / FIRST)

    @property
    def learning_rate(self) -> float:
        """Return the learning rate of the settings, or the default of the method."""
        return self.settings.learning_rate or METHODS[self.settings.method].learning_rate


class Score(NamedTuple):
    """The accuracy on the dev rows, and when it was reached."""

    time: float  # seconds of a clock that all processes share
    accuracy: float


def run_of(cell: Cell, model: Path) -> Run:
    """Return the run of a study's cell. Raises DataError if PEFT's side does not support it."""
    found = vars(cell.settings) | {"method": cell.method}
    for name, value in COMMON.items():
        if found[name] != value:
            raise DataError(f"{cell}: {name} {found[name]!r}: time is compared only with {name} {value!r}; change it")
    if not cell.task.label_words:
        raise DataError(f"{cell}: time is compared by accuracy, so the task needs label words")
    rows, dev = cell.task.parts(cell.settings.seed, cell.shots)
    return Run(str(model), rows, dev, [*cell.task.label_words], cell.settings)


def tell(accuracy: float) -> None:
    """Send a dev score to the parent process."""
    print(json.dumps(Score(time.time(), accuracy)), flush=True)


def run_own(engine: str, folder: Path) -> None:
    """Run with "ort" or "ort-int8"."""
    run = Run.read(folder)
    settings = replace(run.settings, init="file", init_text=None, init_file=str(folder / FIRST))
    task = task_data(settings, run.train, run.dev, tuple(run.label_words))
    known = 0
    for progress in run_task(models.load(Path(run.model)), task, settings, engine.replace("ort", "cpu")):
        if len(progress.state.scores) > known:
            known = len(progress.state.scores)
            tell(float(progress.state.scores[-1, 1]))


# ---- in the parent ----


def engines_here() -> list[str]:
    """List the engines that can run here."""
    return [name for name in available("cpu") if name in ENGINES]


def measure(
    cells: Sequence[Cell], engines: Sequence[str], rounds: int, report: Callable[[str], None], size: str | None = None
) -> dict[str, Any]:
    """Measure the runs of cells with every engine, in alternation.

    Args:
        cells: The cells of a study.
        engines: Names of engines.
        rounds: Number of runs per engine and cell.
        report: Called with a line before each run.
        size: Replace each cell's model by random weights of this size.

    Returns:
        `{"cores", "runs": [{"cell", "reached", "rows", "ratios"}]}`. `reached` is the dev accuracy that every run
        reaches. `rows` and `ratios` have the form of `bench.steps.measure`.

    Raises:
        DataError: PEFT's side does not support a cell.
        ValueError: An engine is unknown or failed.
    """
    known = engines_here()
    for name in engines:
        if name not in known:
            raise ValueError(f"engine {name!r}: expected one of {', '.join(known)}")
    runs = []
    for cell in cells:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            model = cell.model
            if size:
                model = folder / size
                model.mkdir()
                write_model(model, size)
            run_of(cell, model).write(folder)
            runs.append({"cell": str(cell)} | take_turns(folder, engines, rounds, report))
    return {"cores": os.cpu_count(), "runs": runs}


def take_turns(folder: Path, engines: Sequence[str], rounds: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Run every engine in turn. Returns the common accuracy, the measurements and the ratios."""
    found: list[tuple[str, float, list[Score]]] = []
    for i in range(rounds):
        for name in engines:
            report(f"round {i + 1} of {rounds}: {name}")
            started = time.time()
            module = f"tinyprompt.bench.{MODULES[name.partition('-')[0]]}"
            lines = run_once([sys.executable, "-m", module, "tune", name, folder], folder).splitlines()
            found.append((name, started, [Score(*json.loads(line)) for line in lines]))
    reached = min(max(score.accuracy for score in scores) for _, _, scores in found)
    target = f"to accuracy {reached:.3f}"
    notes = Notes()
    for name, started, scores in found:
        notes.add(name, "the whole run", "s", scores[-1].time - started)
        notes.add(name, target, "s", next(x.time for x in scores if x.accuracy >= reached) - started)
        notes.add(name, "best accuracy", "", max(score.accuracy for score in scores))
    ratios = {
        f"{name}_{short}_speedup_vs_peft_fp32": notes.ratio(what, "peft-fp32", name)
        for short, what in (("run", "the whole run"), ("to_accuracy", target))
        for name in engines
        if name.startswith("ort")
    }
    return {"reached": reached, "rows": notes.rows(), "ratios": ratios}


if __name__ == "__main__":
    run_own(sys.argv[2], Path(sys.argv[3]))
