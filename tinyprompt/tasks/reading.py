"""Read rows from any source: files with columns, files of built-in tasks, lists, DataFrames and Datasets."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyprompt import data
from tinyprompt.data import Row
from tinyprompt.errors import DataError
from tinyprompt.files import tables
from tinyprompt.tasks import registry

Source = Any  # a file name, or several for a mixture; Rows, pairs or dicts; a DataFrame; a Dataset


@dataclass(frozen=True)
class Reader:
    """Options for reading rows: the task, the columns, and label words that replace targets."""

    task: str = "auto"
    input: str = "input"
    target: str = "target"
    words: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        registry.check_name(self.task, "setting task")

    def columns(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, except the task."""
        found = {"input": self.input, "target": self.target, "words": dict(self.words or {})}
        return {name: value for name, value in found.items() if value and value != name}

    def read(self, source: Source, training: bool = False, labelled: bool = True, named: bool = False) -> list[Row]:
        """Read the rows of a source.

        Args:
            source: The name of a file, or one name per task of a mixture; `Row`s, pairs or dicts; a DataFrame or
                Dataset with the columns `input` and `target`.
            training: Read training examples: one row per correct answer of ReCoRD, and the true referents of WSC.
            labelled: Set to False to allow missing targets, which become empty.
            named: Prefix each input with the name of the task, as in a mixture.

        Raises:
            DataError: A row cannot be used. The message names the file and the row.
            ValueError: The numbers of files and tasks differ, or an option does not apply.
        """
        if isinstance(source, str | Path):
            source = [source]
        if not (isinstance(source, list | tuple) and source and all(isinstance(x, str | Path) for x in source)):
            return self._from_memory(source, labelled)
        names = self.task.split(",")
        if len(names) != len(source):
            found = f"{len(names)} task{'s' * (len(names) > 1)}, found {len(source)} file{'s' * (len(source) > 1)}"
            raise ValueError(f"--task {self.task}: {found}: {', '.join(map(str, source))}; name one file per task")
        if named or len(names) > 1:
            if self.words or not set(names) <= registry.TASKS.keys():
                raise ValueError(
                    f"--task {self.task}: a mixture consists of built-in tasks with their own words; omit --words"
                )
            parts = [registry.read(*of, training, None, labelled) for of in zip(names, source, strict=True)]
            return registry.mixed(names, parts)
        if self.task not in registry.TASKS:
            return tables.read_rows(source[0], self.input, self.target if labelled else None, self.words)
        if (self.input, self.target) != ("input", "target"):
            raise ValueError(f"--input and --target need a file with columns: use --task auto, not {self.task}")
        return registry.read(self.task, source[0], training, self.words, labelled)

    def label_words(self, rows: Sequence[Row]) -> tuple[str, ...] | None:
        """Return the label words of the task or of the rows, or None for free text."""
        if self.task in registry.TASKS:
            return registry.task_labels(self.task, self.words)
        return data.label_words(rows, self.task)

    def name(self, source: Source) -> str:
        """Return the name of a source for messages."""
        if isinstance(source, str | Path):
            return str(source)
        return str(source[0]) if isinstance(source, list | tuple) and isinstance(source[0], str | Path) else "the rows"

    def _from_memory(self, source: Any, labelled: bool) -> list[Row]:
        """Return the rows of a list, a DataFrame or a Dataset."""
        rows = []
        for number, item in enumerate(_items(source), 1):
            if isinstance(item, Row):
                rows.append(item)
                continue
            if isinstance(item, Mapping):
                record = item
            elif isinstance(item, tuple | list) and len(item) == 2:
                record = {self.input: item[0], self.target: item[1]}
            else:
                wanted = "a Row, a pair (input, target), or a dict"
                raise DataError(f"row {number}: expected {wanted}, found {item!r:.60}")
            target = self.target if labelled else None
            rows.append(tables.row_of(record, self.input, target, self.words, f"row {number}"))
        if not rows:
            raise DataError("no rows: expected at least one")
        return rows


def check_targets(rows: Iterable[Row], words: Sequence[str] | None, where: str, remedy: str) -> None:
    """Raise DataError, with `where` and `remedy`, if a target is not a label word. Free text has no words."""
    wrong = next((row.target for row in rows if words and row.target not in words), None)
    if words and wrong is not None:
        raise DataError(f"{where}: target {wrong!r} is not a label word ({', '.join(words)}); {remedy}")


def _items(source: Any) -> Iterable[Any]:
    """Return the items of a source. The items of a DataFrame or a Dataset are dicts."""
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # pandas
        columns = [str(name) for name in source.columns]
        return (dict(zip(columns, row, strict=True)) for row in source.itertuples(index=False, name=None))
    if isinstance(source, Mapping) and not hasattr(source, "features"):
        kinds = "a file name, rows, a DataFrame or a Dataset"
        raise DataError(f"rows: expected {kinds}, found a dict with the keys {', '.join(map(str, source))}")
    if not isinstance(source, Iterable):
        raise DataError(f"rows: expected a file name, rows, a DataFrame or a Dataset, found {source!r:.60}")
    return source
