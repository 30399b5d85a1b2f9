"""Compute the cells of a study. joblib's processes compute each cell once and write it to its own file.

A study's folder contains one file per cell, `cells/KEY.json`, which is written atomically. `rows.jsonl` collects the
same rows, one per line, in one portable file. A process claims a cell while it computes it. Concurrent studies, and
workers that outlive a killed study, therefore never compute a cell twice.
"""

import contextlib
import functools
import importlib.util
import json
import os
import platform
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinyprompt import data, methods
from tinyprompt.device import threads, version
from tinyprompt.errors import CheckpointError, DataError, DeviceError, TinypromptError
from tinyprompt.files import io, models, tables
from tinyprompt.model import Model, Prompt
from tinyprompt.predict import predict
from tinyprompt.study.grid import Cell
from tinyprompt.tasks import registry
from tinyprompt.train import TaskData
from tinyprompt.tuning import run_task
from tinyprompt.version import VERSION

# Backends of joblib: the module that each needs, and the requirement that installs it.
BACKENDS = {
    "loky": ("joblib", "'tinyprompt-t5[study]'"), "dask": ("distributed", "'dask[distributed]'"), "ray": ("ray", "ray"),
}  # fmt: skip
PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "scikit-learn")  # their versions are stored in a row
ERRORS = (TinypromptError, ValueError, FloatingPointError, OSError, ImportError, MemoryError)  # one cell's
IDLE = 10  # seconds after which an idle process ends, even if the command was killed
Record = dict[str, Any]
turn = threading.Lock()  # one cell at a time per process: a cluster may give a process several threads


class Outcome(NamedTuple):
    """The outcome of a cell: computed, claimed by another run, or failed."""

    key: str
    claimed: bool = False
    error: str | None = None


# ---- files ----


def records(folder: Path) -> dict[str, Record]:
    """Read the rows in the folder of a study, keyed by cell. Raises DataError or CheckpointError."""
    rows, found = folder / "rows.jsonl", {}
    for path, record in [
        *(tables.records(rows) if rows.exists() else ()),
        *((str(path), io.read_json(path)) for path in sorted((folder / "cells").glob("[!.]*.json"))),
    ]:
        kinds = {"key": str, "tests": dict, "settings": dict, "versions": dict, "seconds": int | float}
        wrong = next((name for name, kind in kinds.items() if not isinstance(record.get(name), kind)), None)
        if wrong:
            raise DataError(f"{path}: not a row of a study: {wrong!r} is missing or has the wrong type; remove it")
        found[record["key"]] = record
    return found


def check_settings(cells: Sequence[Cell], found: dict[str, Record], folder: Path) -> None:
    """Raise DataError if the default of a setting has changed since a cell was computed."""
    for cell in cells:
        for name, value in found.get(cell.key, {}).get("settings", {}).items():
            if name != "init_file" and cell.used.get(name) != value:
                told = f"{cell}: was computed with the default {name} {value}; it is now {cell.used.get(name)}"
                raise DataError(f"{folder}: {told}; set {name} in the study, or remove the row")


def write_rows(folder: Path, cells: Sequence[Cell]) -> Path:
    """Write all rows of the folder to one file: the rows of these cells first, in order."""
    found, path = records(folder), folder / "rows.jsonl"
    order = [*(cell.key for cell in cells if cell.key in found), *found]
    lines = (json.dumps(found[key], ensure_ascii=False) + "\n" for key in dict.fromkeys(order))
    io.write({path: "".join(lines).encode()})
    return path


# ---- one cell ----


def run_cell(cell: Cell, folder: Path, wait: bool) -> Outcome:
    """Compute a cell and write its file, unless it exists. `wait` waits while another run computes it."""
    path = folder / "cells" / f"{cell.key}.json"
    with turn, contextlib.ExitStack() as stack:
        try:
            stack.enter_context(io.claimed(path, wait))
        except CheckpointError:
            return Outcome(cell.key, claimed=True)
        if path.exists():
            return Outcome(cell.key)
        io.remove(path.parent.glob(f".{path.name}.*.part"))  # parts that a killed run left behind
        try:
            found = json.dumps(compute(cell), ensure_ascii=False)
        except ERRORS as error:
            return Outcome(cell.key, error=" ".join(str(error).split()) or type(error).__name__)
        io.write({path: f"{found}\n".encode()})
    return Outcome(cell.key)


def compute(cell: Cell) -> Record:
    """Compute the row of a cell: its scores, and all inputs that determine them."""
    started = time.perf_counter()
    answer, about = NOT_TUNED.get(cell.method, tuned)(cell)
    tests, answers = {}, {}
    for name, test in cell.task.tests.items():
        answers[name] = answer([row.input for row in test.rows])
        tests[name] = registry.score(test.task, answers[name], test.rows, cell.labels(name)).as_dict()
    row = {"key": cell.key, "task": cell.task.name, "method": cell.method, "model": cell.model.name, "tests": tests}
    row |= about | {
        "shots": cell.shots,
        "settings": cell.used,
        "fingerprint": cell.fingerprint[:12],
        "device": cell.device,
    }
    row |= {"answers": answers} if cell.answers else {}
    return row | {"seconds": round(time.perf_counter() - started, 3), "versions": versions(), "machine": machine()}


@functools.lru_cache(2)
def load(folder: Path) -> Model:
    """Load a model. The cells of a process share it."""
    return models.load(folder)


def model_of(cell: Cell) -> Model:
    """Return the model of a cell. Raises CheckpointError if its weights have changed since the study was read."""
    model = load(cell.model)
    if model.fingerprint != cell.fingerprint:
        raise CheckpointError(
            f"{cell.model}: its weights or its tokenizer have changed since the study began; restart the study"
        )
    return model


Made = tuple[Callable[[list[str]], Any], Record]  # the function that answers texts, and notes for the row


def tuned(cell: Cell) -> Made:
    """Tune a prompt or another method, and return its answers at the best step."""
    words, kind, model = cell.task.label_words, cell.task.kind, model_of(cell)
    rows, dev = cell.task.parts(cell.settings.seed, cell.shots)
    score = lambda said, of: registry.score(kind, said, of, words).mean
    for progress in run_task(model, TaskData(rows, dev, words, score, cell.init), cell.settings, cell.device):
        last = progress
    state, prompt = last.state, last.prompt
    assert prompt is not None  # every run ends with a dev score
    trained, stored, _ = methods.count(model.config, cell.settings, len(words or ()))
    about = {"dev": state.best_score[0], "best_step": state.best_step, "steps": state.step}
    return lambda texts: predict(model, prompt, texts, cell.device), about | {"trained": trained, "stored": stored}


def bare(cell: Cell) -> Made:
    """Return the answers of the frozen model."""
    model, prompt = model_of(cell), Prompt(label_words=cell.task.label_words, settings=vars(cell.settings))
    return lambda texts: predict(model, prompt, texts, cell.device), {}


def few_shot(cell: Cell) -> Made:
    """Return the answers of the frozen model to inputs that follow solved examples."""
    (shots, _), model = cell.task.parts(cell.settings.seed, cell.shots), model_of(cell)
    most, (answer, about) = cell.settings.max_input_tokens, bare(cell)
    return lambda texts: answer(data.in_context(texts, shots, data.TEMPLATE, model.tokenizer, most)), about


def bag_of_words(cell: Cell) -> Made:
    """Return the answers of logistic regression on word counts. Raises ImportError."""
    try:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ImportError("method 'bag of words': scikit-learn is not installed; pip install scikit-learn") from None
    rows, _ = cell.task.parts(cell.settings.seed, cell.shots)
    count = CountVectorizer(token_pattern=r"\S+")
    fitted = LogisticRegression(max_iter=2000).fit(
        count.fit_transform([row.input for row in rows]), [row.target for row in rows]
    )
    return lambda texts: fitted.predict(count.transform(texts)).tolist(), {}


NOT_TUNED: dict[str, Callable[[Cell], Made]] = {"none": bare, "few-shot": few_shot, "bag of words": bag_of_words}


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute a cell."""
    found = {name: version(name) for name in PACKAGES}
    return {"tinyprompt": VERSION, "python": platform.python_version()} | {k: v for k, v in found.items() if v}


def machine() -> dict[str, Any]:
    """Return the CPU, its cores, and the threads that a cell may use (0: all)."""
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text(errors="replace").splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return {"cpu": name, "cores": os.cpu_count(), "threads": threads(), "system": platform.system()}


# ---- all cells ----


def check_workers(backend: str, jobs: int | None) -> None:
    """Raise ImportError or ValueError before the first cell if no process can be started."""
    for module, what in (BACKENDS["loky"], BACKENDS[backend]):
        if not importlib.util.find_spec(module):
            raise ImportError(f"study: {module} is not installed; pip install {what}")
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs: expected at least 1, found {jobs}")


def run(cells: Sequence[Cell], folder: Path, backend: str = "loky", jobs: int | None = None) -> Iterator[Outcome]:
    """Compute cells in processes. Yields an Outcome for each cell in the order of completion.

    Cells that another run has claimed come last; this run waits for them.

    Args:
        cells: The cells of `read_study`.
        folder: The folder of the study.
        backend: A key of BACKENDS.
        jobs: Number of processes. The default is one with "loky", and all workers of a cluster.

    Raises:
        DeviceError: A process died.
    """
    from joblib import Parallel, delayed

    # joblib replaces a worker between two cells if its cache of sessions has grown too large, and warns about it.
    warnings.filterwarnings("ignore", "A worker stopped while some jobs were given")
    order = "list" if backend == "ray" else "generator_unordered"  # Ray's backend reports all cells at the end
    with workers(backend, jobs):
        for wait in (False, True):
            parallel, claimed = Parallel(return_as=order, batch_size=1), set()
            for outcome in parallel(delayed(run_cell)(cell, folder.resolve(), wait) for cell in cells):
                if outcome.claimed:
                    claimed.add(outcome.key)
                else:
                    yield outcome
            cells = [cell for cell in cells if cell.key in claimed]


@contextlib.contextmanager
def workers(backend: str, jobs: int | None) -> Iterator[None]:
    """Configure joblib's processes. Environment variables locate a cluster: see docs/studies.md."""
    from joblib import parallel_config

    with contextlib.ExitStack() as stack:
        if backend == "dask":
            stack.enter_context(dask_client(jobs))
        elif backend == "ray":
            from ray.util.joblib import register_ray

            register_ray()
        own = {"idle_worker_timeout": IDLE} if backend == "loky" else {}
        stack.enter_context(parallel_config(backend, n_jobs=jobs or (-1 if not own else 1), **own))
        try:
            yield
        except Exception as error:
            if type(error).__name__ not in ("TerminatedWorkerError", "BrokenProcessPool", "KilledWorker"):
                raise
            told = "a process that computed a cell was killed, perhaps because memory ran out; finished cells are kept"
            raise DeviceError(f"{told}; repeat the command to continue, with fewer --jobs to save memory") from None


def dask_client(jobs: int | None) -> Any:
    """Connect to the cluster at DASK_SCHEDULER_ADDRESS, or start workers on this machine."""
    import dask
    from distributed import Client

    if dask.config.get("scheduler-address", None):
        return Client()
    return Client(n_workers=jobs or os.cpu_count(), threads_per_worker=1, dashboard_address=None)
