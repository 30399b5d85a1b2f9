"""The table of a study: mean, standard deviation and number of seeds."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tinyprompt.ensemble import vote
from tinyprompt.study.grid import Cell, Study
from tinyprompt.tasks import registry

NONE = ""  # table entry for an axis that a method ignores


@dataclass(frozen=True)
class Result:
    """The scores of cells on one test set. The cells differ only in their seed."""

    axes: dict[str, Any]  # the axes of the cells without the seed, and the test set
    metric: str
    rows: int  # number of rows of the test set
    scores: list[float]  # in the order of the seeds of the grid
    ensemble: float | None = None  # score of the majority vote over the seeds

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float | None:
        """Return the sample standard deviation, or None for one seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    def as_dict(self) -> dict[str, Any]:
        """Return the result as --json prints it."""
        return asdict(self) | {"mean": self.mean, "spread": self.spread, "seeds": len(self.scores)}

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.spread is None else f" ± {self.spread:.3f}")


@dataclass(frozen=True)
class Summary:
    """The results of a study, the axes of its lines and the axis of its columns."""

    title: str
    results: list[Result]
    down: list[str]
    across: str | None

    def __str__(self) -> str:
        if not self.results:
            return f"{self.title}: no cell is finished"
        tests = {(one.axes["test"], one.metric, one.rows) for one in self.results}
        notes = [f"{test}: {metric} on {rows} rows" for test, metric, rows in sorted(tests)]
        return "\n".join([self.title, "", *markdown(self.table()), "", *notes])

    def columns(self) -> list[Any]:
        """Return the values of the columns in order, or one empty value if there are no columns."""
        found = [one.axes[self.across] for one in self.results if self.across in one.axes]
        return [*dict.fromkeys(found)] if self.across else [NONE]

    def lines(self) -> dict[tuple, dict[Any, Result]]:
        """Group the results by line and column. A result that ignores the column's axis is repeated in every column."""
        lines: dict[tuple, dict[Any, Result]] = {}
        for one in self.results:
            line = lines.setdefault(tuple(one.axes.get(name, NONE) for name in self.down), {})
            for column in [one.axes[self.across]] if self.across in one.axes else self.columns():
                line[column] = one
        return lines

    def table(self) -> list[list[str]]:
        """Return the header and the lines as texts."""
        ensemble = any(one.ensemble is not None for one in self.results)
        columns = self.columns()
        metrics = {one.metric for one in self.results}
        one_name = metrics.pop() if len(metrics) == 1 else "score"
        names = ["average", "best", "ensemble"] if ensemble else [str(x) if self.across else one_name for x in columns]
        out = [[*self.down, *names, "seeds"]]
        for axes, line in self.lines().items():
            if ensemble:
                (one,) = line.values()
                cells = [str(one), f"{max(one.scores):.3f}", f"{one.ensemble:.3f}"]
            else:
                cells = [str(line[x]) if x in line else NONE for x in columns]
            seeds = sorted({len(one.scores) for one in line.values()})
            out.append([*map(str, axes), *cells, " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))])
        return out


def summarize(study: Study, found: Mapping[str, Mapping[str, Any]]) -> Summary:
    """Summarize the cells whose rows exist."""
    groups: dict[tuple, list[Cell]] = {}
    for cell in study.cells:
        if cell.key in found:
            axes = {name: value for name, value in cell.axes.items() if name != "seed"}
            for test in cell.task.tests:
                groups.setdefault(tuple((axes | {"test": test}).items()), []).append(cell)
    results = [result(dict(axes), cells, found) for axes, cells in groups.items()]
    names = dict.fromkeys(name for one in results for name in ("task", "test", *one.axes))
    varied = [name for name in names if varies(name, results)]
    if all(one.axes["test"] == one.axes["task"] for one in results) and study.columns != "test":
        varied = [name for name in varied if name != "test"]
    default = next((name for name in ("test", "task") if name in varied), None)
    across = None if study.ensemble else study.columns or default
    return Summary(study.title, results, [name for name in varied if name != across], across)


def varies(name: str, results: Sequence[Result]) -> bool:
    """Return whether results differ along an axis. Methods that ignore the axis do not count."""
    values = {one.axes[name] for one in results if name in one.axes}
    having, lacking = ({one.axes["method"] for one in results if (name in one.axes) == x} for x in (True, False))
    return len(values) > 1 or bool(having & lacking)


def result(axes: dict[str, Any], cells: Sequence[Cell], found: Mapping[str, Mapping[str, Any]]) -> Result:
    """Return the scores of cells on a test set. If answers were kept, also score their majority vote."""
    test = cells[0].task.tests[axes["test"]]
    rows = [found[cell.key] for cell in cells]
    scores = [row["tests"][axes["test"]] for row in rows]
    ensemble = None
    if cells[0].answers:
        said = [vote(texts, {}) for texts in zip(*(row["answers"][axes["test"]] for row in rows), strict=True)]
        ensemble = registry.score(test.task, said, test.rows, cells[0].labels(axes["test"])).mean
    return Result(axes, scores[0]["metric"], scores[0]["rows"], [one["score"] for one in scores], ensemble)


def escaped(cell: str) -> str:
    """Escape bars and line breaks for a cell of a Markdown table."""
    return " ".join(cell.replace("\\", "\\\\").replace("|", "\\|").splitlines())


def markdown(table: Sequence[Sequence[str]]) -> list[str]:
    """Format a table as Markdown. Numbers are aligned right."""
    right = [all(line[i][:1].isdigit() or not line[i] for line in table[1:]) for i in range(len(table[0]))]
    rule = "| " + " | ".join("---:" if x else "---" for x in right) + " |"
    lines = ["| " + " | ".join(map(escaped, line)) + " |" for line in table]
    return [lines[0], rule, *lines[1:]]
