"""Read a study: a TOML file becomes the cells of its grid. All cells are checked before the first is computed."""

import difflib
import functools
import hashlib
import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyprompt import data
from tinyprompt.data import Row
from tinyprompt.errors import CheckpointError, DataError
from tinyprompt.files import hub, models, prompts, tables
from tinyprompt.methods import METHODS
from tinyprompt.model import Prompt
from tinyprompt.settings import Settings
from tinyprompt.tasks import registry
from tinyprompt.tasks.reading import Reader, check_targets
from tinyprompt.tasks.registry import TASKS

TEXT = ("max_input_tokens", "max_new_tokens", "num_beams", "length_penalty")
# Baselines without tuning, and the settings that their answers depend on.
BASELINES: dict[str, tuple[str, ...]] = {
    "none": ("model", *TEXT),  # the frozen model alone
    "few-shot": ("model", *TEXT, "shots", "seed"),  # solved examples in front of each input
    "bag of words": ("shots", "seed"),  # logistic regression on word counts
}
DEFAULTS = Settings()
SETTINGS = tuple(f.name for f in fields(Settings) if f.name not in ("task", "method"))
GRID = ("task", "model", "method", "shots", *SETTINGS)
SOURCE = {"task": str, "input": str, "target": str, "words": dict}  # keys that describe how a file is read
SHARE = 0.2  # share of the training rows used as dev rows, for a task without a dev file


class TestSet(NamedTuple):
    """Rows to score a prompt on, with the metrics of their task."""

    task: str
    rows: list[Row]
    label_words: tuple[str, ...] | None  # in the order of this test's task


@dataclass(frozen=True)
class Task:
    """The training, dev and test rows of a task."""

    name: str
    kind: str  # the setting `task`
    rows: list[Row]
    dev: list[Row] | int  # or how many training rows become dev rows
    tests: dict[str, TestSet]
    label_words: tuple[str, ...] | None

    @functools.cached_property
    def digest(self) -> str:
        """Return a digest of the rows, the label words and the tests."""
        plain = lambda rows: [*map(tuple, rows)]
        tests = [(name, test.task, plain(test.rows), test.label_words) for name, test in self.tests.items()]
        dev = self.dev if isinstance(self.dev, int) else plain(self.dev)
        return digest(repr((self.kind, self.label_words, plain(self.rows), dev, tests)))

    def parts(self, seed: int, shots: int | None) -> tuple[list[Row], list[Row]]:
        """Return the training and dev rows of a run. The seed draws `shots` training rows."""
        if isinstance(self.dev, int):
            rows, dev = data.split(self.rows, self.dev / len(self.rows), seed)
        else:
            rows, dev = self.rows, self.dev
        if shots is not None:
            rows = [rows[i] for i in np.random.default_rng(seed).choice(len(rows), shots, replace=False)]
        return rows, dev


@dataclass(frozen=True)
class Cell:
    """One result of a study: a method with its settings on the rows of a task."""

    axes: dict[str, Any]  # the axes of the grid that this cell depends on
    method: str
    settings: Settings
    shots: int | None
    task: Task
    model: Path
    fingerprint: str  # fingerprint of the model
    device: str
    init: Prompt | tuple[str, ...] = ()  # initial prompt, or words that initialise it if the task has no label words
    answers: bool = False  # whether the row stores the answers

    @functools.cached_property
    def key(self) -> str:
        """Return a digest of all inputs of the result. Default settings are omitted, so that settings can be added."""
        changed = {name: value for name, value in self.used.items() if value != getattr(DEFAULTS, name)}
        if isinstance(self.init, Prompt):
            changed["init_file"] = {name: value.tolist() for name, value in self.init.params.items()}
        parts = (self.method, changed, self.shots, self.task.digest, self.fingerprint, self.device, self.answers)
        return digest(json.dumps(parts, sort_keys=True))

    def labels(self, test: str) -> tuple[str, ...] | None:
        """Return the labels in the order of the test's task."""
        return self.task.tests[test].label_words or self.task.label_words

    @property
    def used(self) -> dict[str, Any]:
        """Return the settings that affect the result."""
        names = BASELINES.get(self.method, SETTINGS)
        return {name: getattr(self.settings, name) for name in SETTINGS if name in names}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.axes.items())


class Study(NamedTuple):
    """The cells of a study in the order of its grid, and the layout of its report."""

    title: str
    cells: list[Cell]
    columns: str | None  # the axis of the columns; None is the test set
    ensemble: bool


def digest(text: str) -> str:
    """Return the first 20 hexadecimal digits of the sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def read_study(path: Path, device: str) -> Study:
    """Read a study and the rows of its tasks, and check every cell. No cell is computed.

    Raises:
        DataError: The study or a row is invalid. The message names the file and the key.
        CheckpointError: A model or a prompt cannot be used.
    """
    try:
        found = tomllib.loads(tables.read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not valid TOML ({error})") from None
    expected = dict(title=str, ensemble=bool, columns=str, settings=dict, methods=dict, tasks=dict, grid=(dict, list))
    check(found, expected, str(path), ("tasks", "grid"))
    reader = StudyFile(path, found, device)
    cells = {cell.key: cell for cell in reader.cells()}
    if not cells:
        raise DataError(f"{path}: no cells; expected at least one task and one value on each axis of the grid")
    columns = found.get("columns")
    axes = {"test": 0} | {name: 0 for cell in cells.values() for name in cell.axes if name != "seed"}
    if columns is not None and columns not in axes:
        raise DataError(f"{path}: columns: expected one of {', '.join(axes)}, found {columns!r}")
    return Study(found.get("title", path.stem), [*cells.values()], columns, found.get("ensemble", False))


class StudyFile:
    """The tables of a study file, with a cache of its tasks and models."""

    def __init__(self, path: Path, found: dict[str, Any], device: str) -> None:
        self.path, self.found, self.device = path, found, device
        self.settings, self.methods = found.get("settings", {}), found.get("methods", {})
        check(self.settings, ("shots", *SETTINGS), f"{path}: [settings]")
        check(self.methods, dict.fromkeys((*BASELINES, *METHODS), dict), f"{path}: [methods]")
        for name, table in self.methods.items():
            check(table, ("shots", *SETTINGS), f"{path}: [methods.{name}]")
        self.tasks = {name: self.read_task(name, table) for name, table in found["tasks"].items()}
        self.models: dict[str, tuple[Path, str]] = {}
        self.inits: dict[str, Prompt] = {}

    def read_task(self, name: str, table: Any) -> Task:
        """Read the rows of a task. Raises DataError."""
        where = f"{self.path}: [tasks.{name}]"
        own = {"train": str, "dev": str, "dev_rows": int, "test": (str, dict), "settings": dict}
        check(table, SOURCE | own, where, ("train", "test"))
        check(table.get("settings", {}), ("shots", *SETTINGS), f"{self.path}: [tasks.{name}.settings]")
        source = {key: table[key] for key in SOURCE if key in table}
        kind, rows = table.get("task", "auto"), self.read_rows(source, table["train"], where, training=True)
        words = Reader(**source).label_words(rows)
        dev = self.read_dev(source, table, rows, where)
        tests = {}
        given = table["test"] if isinstance(table["test"], dict) else {name: table["test"]}
        check(given, dict.fromkeys(given, (str, dict)), f"{where}: test", tuple(given) or ("the name of a test set",))
        for key, entry in given.items():
            tests[key] = self.read_test(
                source, entry if isinstance(entry, dict) else {"file": entry}, f"{where}: {key}"
            )
        for part, some in {"dev": dev, **{key: test.rows for key, test in tests.items()}}.items():
            check_targets([] if isinstance(some, int) else some, words, f"{where}: {part}", "map it with words")
        return Task(name, kind, rows, dev, tests, words)

    def read_rows(self, source: Mapping[str, Any], file: str, where: str, training: bool = False) -> list[Row]:
        """Read the rows of a file. Its path is relative to the study."""
        kind, path = source.get("task", "auto"), self.path.parent / file
        if kind not in (*data.TASKS, *TASKS):
            raise DataError(f"{where}: task {kind!r}: expected one of {', '.join((*data.TASKS, *TASKS))}")
        if kind in TASKS and ("input" in source or "target" in source):
            raise DataError(f"{where}: task {kind!r} knows its columns; leave input and target out")
        try:
            return Reader(**source).read(path, training)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None

    def read_dev(self, source: Mapping[str, Any], table: Mapping[str, Any], rows: list[Row], where: str) -> Any:
        """Return the dev rows of a task, or how many training rows become dev rows."""
        number = table.get("dev_rows")
        if "dev" in table:
            dev = self.read_rows(source, table["dev"], where)
            if number is None:
                return dev
            check_number(number, len(dev), f"{where}: dev_rows", "rows of the dev file")
            return data.split(dev, number / len(dev), seed=0)[1]
        if any(row.group for row in rows):
            raise DataError(f"{where}: rows of the same item must not be split; name a dev file with dev")
        if number is None:
            number = max(1, round(SHARE * len(rows)))
        return check_number(number, len(rows) - 1, f"{where}: dev_rows", "training rows but one")

    def read_test(self, source: dict[str, Any], entry: dict[str, Any], where: str) -> TestSet:
        """Read a test set of the same task, or of another task whose labels are mapped by words."""
        check(entry, SOURCE | {"file": str}, where, ("file",))
        source = ({} if "task" in entry else source) | {key: entry[key] for key in SOURCE if key in entry}
        kind, words = source.get("task", "auto"), source.get("words")
        rows = self.read_rows(source, entry["file"], where)
        return TestSet(kind, rows, registry.task_labels(kind, words) if kind in TASKS else None)

    def cells(self) -> Iterator[Cell]:
        """Yield the cells of every grid. Raises DataError that names the invalid key."""
        grids = self.found["grid"] if isinstance(self.found["grid"], list) else [self.found["grid"]]
        if not grids:
            raise DataError(f"{self.path}: grid: expected at least one")
        varied = {name for grid in grids if isinstance(grid, dict) for name in grid}
        for number, grid in enumerate(grids, 1):
            where = f"{self.path}: [grid]" if len(grids) == 1 else f"{self.path}: [[grid]] {number}"
            check(grid, dict.fromkeys(GRID, list), where)
            for name, values in grid.items():
                plain = all(isinstance(x, str | int | float) for x in values)
                if not values or not plain or any(x == y for x, y in itertools.combinations(values, 2)):
                    raise DataError(f"{where}: {name}: expected a list of different values, found {values}")
            default = {"task": [*self.tasks], "model": ["base"], "method": ["prompt"]}
            named = {name: grid.get(name, default.get(name)) for name in dict.fromkeys((*default, *grid))}
            for values in itertools.product(*named.values()):
                chosen = dict(zip(named, values, strict=True))
                try:
                    yield self.cell(chosen, varied)
                except (TypeError, ValueError) as error:
                    made = f"{where}: " if not str(error).startswith(str(self.path)) else ""
                    kind = CheckpointError if isinstance(error, CheckpointError) else DataError
                    raise kind(f"{made}{error}") from None

    def cell(self, chosen: dict[str, Any], varied: set[str]) -> Cell:
        """Build the cell for one combination of values. Raises TypeError or ValueError that names the setting."""
        method = chosen["method"]
        if method not in (*METHODS, *BASELINES):
            raise DataError(f"method: expected one of {', '.join((*METHODS, *BASELINES))}, found {method!r}")
        task, values = self.values(chosen)
        used = {"task", "method", *BASELINES.get(method, ("model", "shots", *SETTINGS))}
        settings = Settings(**{name: x for name, x in values.items() if name in {*SETTINGS} & used}, task=task.kind)
        settings = replace(settings, method=method) if method in METHODS else settings
        shots = values.get("shots") if "shots" in used else None
        every = vars(settings) | {"shots": shots} | chosen
        axes = {name: every[name] for name in GRID if name in used & (varied | {"task", "method", "model"})}
        axes = {name: x for name, x in axes.items() if x is not None}
        path, fingerprint = self.model(chosen["model"]) if "model" in used else (Path(), "")
        device, init = self.device if "model" in used else "", self.first(settings) if method in METHODS else ()
        keep = self.found.get("ensemble", False)
        return Cell(axes, method, settings, shots, task, path, fingerprint, device, init, keep)

    def values(self, chosen: dict[str, Any]) -> tuple[Task, dict[str, Any]]:
        """Return the checked task and settings for one combination of values."""
        name, method = chosen["task"], chosen["method"]
        if name not in self.tasks:
            raise DataError(f"task: expected one of {', '.join(self.tasks)}, found {name!r}")
        task, own = self.tasks[name], self.found["tasks"][name].get("settings", {})
        values = self.settings | own | self.methods.get(method, {}) | chosen
        Settings(**{name: x for name, x in values.items() if name in SETTINGS}, task=task.kind)
        if "shots" in values:
            most = len(task.rows) - (task.dev if isinstance(task.dev, int) else 0)
            check_number(values["shots"], most, "shots", f"training rows of task {name}")
        elif method == "few-shot":
            raise DataError("method 'few-shot': the number of examples is missing; set shots")
        return task, values

    def model(self, name: Any) -> tuple[Path, str]:
        """Return the folder and the fingerprint of a model: a path relative to the study, or a name for --model."""
        if not isinstance(name, str):
            raise DataError(f"model: expected a name or a folder, found {name!r}")
        if name not in self.models:
            beside = self.path.parent / name
            folder = (beside if beside.is_dir() else hub.find(name)).resolve()
            self.models[name] = folder, models.load(folder).fingerprint
        return self.models[name]

    def first(self, settings: Settings) -> Prompt | tuple[str, ...]:
        """Return TaskData.init: the saved prompt of init "file", or the words of a built-in task."""
        if settings.init != "file":
            return TASKS[settings.task].init if settings.task in TASKS else ()
        if settings.init_file is None:
            raise DataError("init 'file': the prompt is missing; name a saved prompt with init_file")
        if settings.init_file not in self.inits:
            self.inits[settings.init_file] = prompts.load_prompt(str(self.path.parent / settings.init_file))
        return self.inits[settings.init_file]


def check(table: Any, allowed: Any, where: str, needed: Sequence[str] = ()) -> None:
    """Raise DataError for a table with an unknown key, a wrong type, or a missing key.

    Args:
        table: The table to check.
        allowed: The names of the keys, or a dict from name to type.
        where: The place in the file, for messages.
        needed: Names of the required keys.
    """
    names = {str: "a text", bool: "true or false", int: "a whole number", dict: "a table", list: "a list"}
    if not isinstance(table, dict):
        raise DataError(f"{where}: expected a table, found {table!r}")
    for key, value in table.items():
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, 1)
            told = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(allowed)}"
            raise DataError(f"{where}: unknown key {key!r}; {told}")
        kinds = allowed[key] if isinstance(allowed, dict) else object
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and not {bool, object} & set(kinds)):
            expected = " or ".join(names[kind] for kind in kinds)
            raise DataError(f"{where}: {key}: expected {expected}, found {value!r}")
    for key in needed:
        if key not in table:
            raise DataError(f"{where}: expected {key}, which is missing")


def check_number(value: Any, most: int, where: str, what: str) -> int:
    """Check that a value is an integer from 1 to `most`. Raises DataError."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise DataError(f"{where}: expected 1 to the {most} {what}, found {value!r}")
    return value
