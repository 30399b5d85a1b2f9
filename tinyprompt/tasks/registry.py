"""The built-in tasks: the reader, the label words and the metrics of each task."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyprompt import data, display
from tinyprompt.data import Row
from tinyprompt.errors import DataError
from tinyprompt.tasks import metrics
from tinyprompt.tasks.readers import Example, agnews, cola, label_of, multirc, record, squad, table, trec, wsc

PLAIN = data.TASKS
DEMO = Path(__file__).parents[1] / "demo"  # demo rows: TASK.PART.tsv
DEMO_TASKS = ("topic", "sentiment")


class Task(NamedTuple):
    """The reader and the metrics of a task. Without label words, answers are free text."""

    examples: Callable[[Path], Iterator[Example]]
    metrics: dict[str, Callable[[Sequence[str], Sequence[Row], Sequence[str]], float]]
    labels: tuple[str, ...] | None = None  # in the order of their codes; the second of two is the positive class
    init: tuple[str, ...] = ()  # words that initialise the prompt if there are no label words
    training: Callable[[Example], Iterator[Example]] = lambda example: iter([example])  # training examples of one


def read(
    name: str, path: str | Path, training: bool = False, words: Mapping[str, str] | None = None, labelled: bool = True
) -> list[Row]:
    """Read the rows of a file of the task.

    Args:
        name: The name of the task.
        path: The path of the file.
        words: Label words that replace the task's own, for example {"equivalent": "duplicate", ...}.
        training: Read training examples: one row per correct answer of ReCoRD, and the true referents of WSC.
        labelled: Set to False to allow missing targets, which become "".

    Raises:
        DataError: A row cannot be used. The message names the file and the row.
    """
    task, rows = TASKS[name], []
    named = dict(zip(task.labels or (), task_labels(name, words) or (), strict=True))
    for example in task.examples(Path(path)):
        for one in task.training(example) if training else [example]:
            target: Any = one.target
            if not labelled:
                target = ""
            elif target is None:
                raise DataError(f"{one.where}: has no label or answer; name a file with labels, such as train or val")
            elif task.labels:
                target = named[label_of(target, task.labels, one.where)]
            rows.append(Row(one.input.strip(), target.strip(), one.answers, one.group))
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def mixed(names: Sequence[str], parts: Sequence[Sequence[Row]]) -> list[Row]:
    """Join the rows of several tasks as T5 does: the task name prefixes each input, and answers are free text.

    All rows are kept. This equals T5's mixing in proportion to the sizes, below its limit of 2**19 rows per task
    (Raffel et al. 2020, arXiv:1910.10683, section 3.5.2).
    """
    return [
        row._replace(input=f"{name} {row.input}", task=name)
        for name, rows in zip(names, parts, strict=True)
        for row in rows
    ]


def task_labels(name: str, words: Mapping[str, str] | None = None) -> tuple[str, ...] | None:
    """Return the label words of a task, or their replacements, or None for free text. Raises DataError."""
    labels = TASKS[name].labels
    if words and set(words) != set(labels or ()):
        expected = ", ".join(labels or ()) or "nothing: its answers are free text"
        raise DataError(f"task {name}: expected words for {expected}; found words for {', '.join(words)}")
    if not words or not labels:
        return labels
    found = tuple(words[label] for label in labels)
    if len(set(found)) < len(found) or (set(found) == set(labels) and found != labels):
        raise DataError(f"task {name}: expected distinct words that do not swap labels, found {', '.join(found)}")
    return found


def check_name(name: str, where: str) -> None:
    """Raise ValueError unless `name` is a built-in task, a mixture ("a,b"), or a way to read files with columns.

    The message begins with `where`.
    """
    known = TASKS if "," in name else (*PLAIN, *TASKS)
    for part in name.split(","):
        if part not in known:
            raise ValueError(f"{where}: task {part!r}: expected one of {', '.join(known)}")


@dataclass(frozen=True, repr=False)
class Scores:
    """The metrics of a task by name, and their mean, which is the dev score (section 3.1 of the paper)."""

    metrics: dict[str, float]
    mean: float
    rows: int
    name: str  # name of the mean
    labels: tuple[str, ...] = ()  # empty for free text
    confusion: list[list[int]] | None = None  # counts by target (row) and answer (column); None for free text

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as --json prints them."""
        return {"metric": self.name, "score": self.mean, "scores": self.metrics, "rows": self.rows}

    def __repr__(self) -> str:
        each = "".join(f"; {name} {x:.3f}" for name, x in self.metrics.items()) if len(self.metrics) > 1 else ""
        return f"{self.name} {self.mean:.3f} on {self.rows} rows{each}"

    def _repr_html_(self) -> str:
        scores = display.table([(name, f"{x:.3f}") for name, x in self.metrics.items()])
        if not self.confusion:
            return scores
        counts = ((label, *row) for label, row in zip(self.labels, self.confusion, strict=True))
        return scores + display.table(counts, ("target / answer", *self.labels))


def score(name: str, predicted: Sequence[str], rows: Sequence[Row], labels: Sequence[str] | None) -> Scores:
    """Score answers with every metric of a task. The score of a mixture, "boolq,rte", is the mean over its tasks.

    Args:
        name: The name of the task.
        predicted: The answers.
        rows: The rows with their targets.
        labels: The label words in the order of the task, or None for free text.

    Raises:
        ValueError: The numbers of answers and rows differ or are 0.
    """
    if "," in name:
        parts = {part: score(part, said, of, None) for part, said, of in _parts(name, predicted, rows)}
        found = {f"{part} {metric}": x for part, one in parts.items() for metric, x in one.metrics.items()}
        mean, of = float(np.mean([one.mean for one in parts.values()])), "the tasks " + " and ".join(parts)
    else:
        found = _metrics(name, predicted, rows, labels)
        mean, of = float(np.mean(list(found.values()))), " and ".join(found)
    name = f"mean of {of}" if len(found) > 1 else of
    counts = metrics.confusion(predicted, _targets(rows), labels) if labels else None
    return Scores(found, mean, len(rows), name, tuple(labels or ()), counts)


def _metrics(
    name: str, predicted: Sequence[str], rows: Sequence[Row], labels: Sequence[str] | None
) -> dict[str, float]:
    """Compute every metric of a single task."""
    if name in PLAIN:
        return {"accuracy" if labels else "exact match": metrics.accuracy(predicted, [row.target for row in rows])}
    task = TASKS[name]
    if not labels or set(labels) == set(task.labels or ()):
        labels = task.labels
    return {metric: function(predicted, rows, labels or ()) for metric, function in task.metrics.items()}


def _parts(name: str, predicted: Sequence[str], rows: Sequence[Row]) -> Iterator[tuple[str, list[str], list[Row]]]:
    """Yield the name of each task of a mixture, its answers and its rows."""
    for part in name.split(","):
        pairs = [(answer, row) for answer, row in zip(predicted, rows, strict=True) if row.task == part]
        yield part, [answer for answer, _ in pairs], [row for _, row in pairs]


DETERMINERS = set(
    "a an few her his each every many much my our some that the their these this those which whose your".split()  # noqa: SIM905
)


def _words(text: str) -> set[str]:
    """Return the distinct lower-case words of a text, without determiners."""
    return set(text.lower().split()) - DETERMINERS


def _means(predicted: str, referent: str) -> bool:
    """Test whether an answer denotes a referent: one contains the other's words, and both or neither are genitives."""
    one, other = _words(predicted), _words(referent)
    return ("'" in predicted) == ("'" in referent) and bool(one and other) and (one <= other or other <= one)


def _referent_accuracy(predicted: Sequence[str], rows: Sequence[Row], labels: Sequence[str]) -> float:
    """Compute the share of rows where the answer denotes the referent exactly if the referent is the true one."""
    said = [str(_means(p, row.target)) if _words(p) else "" for p, row in zip(predicted, rows, strict=True)]
    return metrics.accuracy(said, [str(bool(row.answers)) for row in rows])


def _targets(rows: Sequence[Row]) -> list[str]:
    return [row.target for row in rows]


ACCURACY = {"accuracy": lambda predicted, rows, labels: metrics.accuracy(predicted, _targets(rows))}
F1 = {"f1": lambda predicted, rows, labels: metrics.f1(predicted, _targets(rows), labels[1])}
MACRO_F1 = {"macro f1": lambda predicted, rows, labels: metrics.macro_f1(predicted, _targets(rows), labels)}
MATTHEWS = {"matthews": lambda predicted, rows, labels: metrics.matthews(predicted, _targets(rows), labels)}
GROUPS = {
    "exact match": lambda predicted, rows, labels: metrics.group_exact_match(
        predicted, _targets(rows), [row.group for row in rows]
    )
}
ANSWERS = {
    "exact match": lambda predicted, rows, labels: metrics.answer_exact_match(predicted, [row.answers for row in rows]),
    "f1": lambda predicted, rows, labels: metrics.answer_f1(predicted, [row.answers for row in rows]),
}
BOOL, ENTAILMENT = ("False", "True"), ("entailment", "not_entailment")

TASKS = {
    # SuperGLUE
    "boolq": Task(table("passage", "question"), ACCURACY, BOOL),
    "cb": Task(table("hypothesis", "premise"), MACRO_F1 | ACCURACY, ("entailment", "contradiction", "neutral")),
    "copa": Task(table("choice1", "choice2", "premise", "question"), ACCURACY, ("choice1", "choice2")),
    "multirc": Task(multirc, F1 | GROUPS, BOOL),
    "record": Task(
        record,
        ANSWERS,
        init=("commonsense", "reasoning", "reading", "comprehension"),
        training=lambda example: (example._replace(target=answer) for answer in example.answers or [None]),
    ),
    "rte": Task(table("hypothesis", "premise"), ACCURACY, ENTAILMENT),
    "wic": Task(table("sentence1", "sentence2", "word"), ACCURACY, BOOL),
    "wsc": Task(
        wsc,
        {"accuracy": _referent_accuracy},
        init=("commonsense", "pronoun", "resolution"),
        training=lambda example: iter([example] if example.answers or example.target is None else []),
    ),
    "axb": Task(table("hypothesis", "premise", hypothesis="sentence2", premise="sentence1"), MATTHEWS, ENTAILMENT),
    "axg": Task(table("hypothesis", "premise"), ACCURACY, ENTAILMENT),
    # GLUE
    "cola": Task(cola, MATTHEWS, ("unacceptable", "acceptable")),
    "glue-rte": Task(table("sentence1", "sentence2"), ACCURACY, ENTAILMENT),
    "mrpc": Task(
        table("sentence1", "sentence2", label="label|Quality", sentence1="#1 String", sentence2="#2 String"),
        F1 | ACCURACY,
        ("not_equivalent", "equivalent"),
    ),
    "qqp": Task(
        table(
            "question1", "question2", label="label|is_duplicate", broken=True, question1="text_a", question2="text_b"
        ),
        F1 | ACCURACY,
        ("not_duplicate", "duplicate"),
    ),
    "sst2": Task(table("sentence"), ACCURACY, ("negative", "positive")),
    # Others
    "squad": Task(squad, ANSWERS),
    "trec": Task(trec, ACCURACY, ("short", "meaning", "thing", "person", "place", "number")),
    "agnews": Task(agnews, ACCURACY, ("World", "Sports", "Business", "Sci/Tech")),
}
