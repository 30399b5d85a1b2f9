"""Built-in tasks: files as they are distributed, to rows in T5's text formats, and the metrics of their papers.

The formats are those of t5.data.preprocessors without the task's name in front, as in Lester et al. 2021: the columns
by name, "hypothesis: ... premise: ...", sorted (unless said otherwise). White space at both ends of a text is dropped.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyprompt import data, metrics
from tinyprompt.data import DataError, Row

PLAIN = ("auto", "classify", "generate")  # files of columns: label words found, wanted or not
PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
BLANKS = re.compile(r"[\t\n\f\r ]+")


class Example(NamedTuple):
    """A row as a file has it. The target is None where the file does not tell, else a label's code or word, or text."""

    where: str
    input: str
    target: Any
    answers: tuple[str, ...] = ()
    group: str = ""


class Task(NamedTuple):
    """How files become examples, and answers scores. Without label words the answer is free text."""

    examples: Callable[[Path], Iterator[Example]]
    metrics: dict[str, Callable[[Sequence[str], Sequence[Row], Sequence[str]], float]]
    labels: tuple[str, ...] | None = None  # in the order of their codes; of two, the second is the positive one
    init: tuple[str, ...] | None = None  # words for the first prompt, where there are no label words
    training: Callable[[Example], Iterator[Example]] = lambda example: iter([example])  # what is learned from one


def read(
    name: str,
    path: str | Path,
    training: bool = False,
    words: Mapping[str, str] | None = None,
    labelled: bool = True,
) -> list[Row]:
    """Rows of a file of the task.

    training: what is learned from: one row for each right answer of ReCoRD, the true referents of WSC.
    words: other label words, {"equivalent": "duplicate", ...}. labelled: without it targets may be missing, and are "".
    Raises DataError that names the file and the row.
    """
    task, rows = TASKS[name], []
    named = dict(zip(task.labels or (), labels_of(name, words) or (), strict=True))
    for example in task.examples(Path(path)):
        for one in task.training(example) if training else [example]:
            target: Any = one.target
            if not labelled:
                target = ""
            elif target is None:
                raise DataError(f"{one.where}: has no label or answer; name a file that does, such as train or val")
            elif task.labels:
                target = named[_label(target, task.labels, one.where)]
            rows.append(Row(one.input.strip(), target.strip(), one.answers, one.group))
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def mixed(names: Sequence[str], parts: Sequence[Sequence[Row]]) -> list[Row]:
    """One set of rows for all tasks: behind the task's name, answered with free text, as T5 was tuned on many at once.

    All rows of each: that is T5's mixing in proportion to their numbers, below its limit of 2**19 rows a task
    (Raffel et al. 2020, arXiv:1910.10683, section 3.5.2).
    """
    return [
        row._replace(input=f"{name} {row.input}", task=name)
        for name, rows in zip(names, parts, strict=True)
        for row in rows
    ]


def labels_of(name: str, words: Mapping[str, str] | None = None) -> tuple[str, ...] | None:
    """The label words of a task, or those in their place; None for free text. Raises DataError."""
    labels = TASKS[name].labels
    if words and set(words) != set(labels or ()):
        expected = ", ".join(labels or ()) or "nothing: its answers are free text"
        raise DataError(f"task {name}: expected words for {expected}; found some for {', '.join(words)}")
    if not words or not labels:
        return labels
    found = tuple(words[label] for label in labels)
    if len(set(found)) < len(found) or (set(found) == set(labels) and found != labels):
        raise DataError(f"task {name}: expected different words, none in another's place, found {', '.join(found)}")
    return found


def first_words(name: str) -> tuple[str, ...] | None:
    """Words for the first prompt of a task without label words, where the paper names some (section 3.2)."""
    return TASKS[name].init if name in TASKS else None


def score(name: str, predicted: Sequence[str], rows: Sequence[Row], labels: Sequence[str] | None) -> dict[str, float]:
    """Every metric of the task by name; `mean_score` makes one number of them. "boolq,rte" is a mixture of tasks.

    labels: in the task's order, or None for free text. Raises ValueError on unequal lengths or none.
    """
    if "," in name:
        parts = _parts(name, predicted, rows)
        return {f"{part} {key}": x for part, said, of in parts for key, x in score(part, said, of, None).items()}
    if name in PLAIN:
        return {"accuracy" if labels else "exact match": metrics.accuracy(predicted, [row.target for row in rows])}
    task = TASKS[name]
    if not labels or set(labels) == set(task.labels or ()):
        labels = task.labels
    return {metric: function(predicted, rows, labels or ()) for metric, function in task.metrics.items()}


def mean_score(name: str, predicted: Sequence[str], rows: Sequence[Row], labels: Sequence[str] | None) -> float:
    """The mean of the task's metrics, of a mixture that of its tasks: the dev score (section 3.1)."""
    if "," in name:
        return float(np.mean([mean_score(part, said, of, None) for part, said, of in _parts(name, predicted, rows)]))
    return float(np.mean(list(score(name, predicted, rows, labels).values())))


def _parts(name: str, predicted: Sequence[str], rows: Sequence[Row]) -> Iterator[tuple[str, list[str], list[Row]]]:
    """The name of each task of a mixture, its answers and its rows."""
    for part in name.split(","):
        pairs = [(answer, row) for answer, row in zip(predicted, rows, strict=True) if row.task == part]
        yield part, [answer for answer, _ in pairs], [row for _, row in pairs]


def _label(value: Any, labels: Sequence[str], where: str) -> str:
    """The label word of a word or of a code 0, 1, ..., which may be a text or a bool. Raises DataError."""
    if value in labels and isinstance(value, str):
        return value
    code = int(value) if isinstance(value, bool) or str(value) in map(str, range(len(labels))) else None
    if code is None:
        codes = ", ".join(f"{i} or {label!r}" for i, label in enumerate(labels))
        raise DataError(f"{where}: label {value!r}: expected one of {codes}")
    return labels[code]


def _get(record: Any, key: str, kind: type, where: str) -> Any:
    """A value of a JSON object or of a table's record. Raises DataError."""
    if not isinstance(record, dict) or key not in record:
        found = ", ".join(map(repr, record)) if isinstance(record, dict) else repr(record)[:40]
        raise DataError(f"{where}: expected {key!r}, found {found}; is this a file of that task (--task)?")
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool) or (kind is str and not str(value).strip()):
        name = {str: "a text", list: "a list", dict: "an object", int: "a whole number"}[kind]
        raise DataError(f"{where}: {key!r}: expected {name}, found {value!r:.40}")
    return value


def _many(record: dict, key: str, where: str) -> list:
    """The list under a key, which may be missing. Raises DataError."""
    return [] if record.get(key) is None else _get(record, key, list, where)


def _unknown(value: Any) -> bool:
    """Whether this label says that there is none."""
    return value is None or value in ("", -1, "-1")


def table(*keys: str, label: str = "label", header: Sequence[str] | None = None, **columns: str):
    """The reader of a file of columns, whose texts are named by their keys.

    columns: another name that a file may have for a key. label: the names it may have for the label, between "|".
    header: the names of all columns, for a file without a header line.
    """

    def examples(path: Path) -> Iterator[Example]:
        for number, record in data.records(path, header):
            where = f"{path}: row {number}"
            names = {key: columns[key] if columns.get(key) in record else key for key in keys}
            texts = [f"{key}: {_get(record, name, str, where)}" for key, name in names.items()]
            target = next((record[name] for name in label.split("|") if name in record), None)
            yield Example(where, " ".join(texts), None if _unknown(target) else target)

    return examples


def multirc(path: Path) -> Iterator[Example]:
    """One example for each candidate answer; those of a question are a group. Tags are dropped."""
    for number, record in data.records(path):
        where = f"{path}: row {number}"
        passage = _get(record, "passage", dict, where)
        text = _get(passage, "text", str, where)
        for q in _get(passage, "questions", list, where):
            question, group = _get(q, "question", str, where), str(_get(q, "idx", int, where))
            for answer in _get(q, "answers", list, f"{where}: question {group}"):
                here = f"{where}: question {group}"
                joined = f"question: {question} answer: {_get(answer, 'text', str, here)} paragraph: {text}"
                joined = re.sub("</?b>", "", joined.replace("<br>", " "))
                target = answer.get("label")
                yield Example(here, joined, None if _unknown(target) else target, group=f"{record.get('idx')}-{group}")


def record(path: Path) -> Iterator[Example]:
    """ReCoRD: one example for each query, with all its answers."""
    for number, line in data.records(path):
        where = f"{path}: row {number}"
        passage = _get(line, "passage", dict, where)
        text = _get(passage, "text", str, where)
        spans = _get(passage, "entities", list, where)
        found = {text[_get(span, "start", int, where) : _get(span, "end", int, where) + 1] for span in spans}
        entities = ", ".join(sorted(found))
        text = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", text).replace("\n@highlight\n", ". ")
        for qa in _get(line, "qas", list, where):
            query = _get(qa, "query", str, where)
            answers = sorted({_get(a, "text", str, where) for a in _many(qa, "answers", where)})
            joined = f"query: {query} entities: {entities} passage: {text}"
            group = f"{line.get('idx')}-{qa.get('idx')}"
            yield Example(where, joined, answers[0] if answers else None, tuple(answers), group)


def wsc(path: Path) -> Iterator[Example]:
    """The text with its *pronoun* marked; the target is the referent to judge, an answer only if it is the true one.

    Some spans of the files are not in their texts, and some indices are off by one: as TFDS and T5, this mends them.
    """
    for number, record in data.records(path):
        where = f"{path}: row {number}"
        text, spans = _get(record, "text", str, where), _get(record, "target", dict, where)
        (referent, start), (pronoun, at) = (
            (_get(spans, f"span{i}_text", str, where), _get(spans, f"span{i}_index", int, where)) for i in (1, 2)
        )
        words = text.split(" ")
        found = re.compile(rf"{re.escape(pronoun)}(?!\w)")
        near = [i for i in (at, at + 1) if 0 <= i < len(words) and found.match(words[i])]
        if not near or not 0 <= start < len(text.split()):
            raise DataError(f"{where}: expected {pronoun!r} as word {at} of {text[:40]!r}..., and {start} to be a word")
        at = near[0]
        words[at] = f"*{pronoun}* {words[at][len(pronoun) :]}".strip()
        if referent not in text:
            fold = str.lower if text.split()[start][0].islower() else str.upper
            referent = (fold(referent[0]) + referent[1:]).rstrip(".").replace("\n", " ")
        label = record.get("label")
        answers = (referent,) if not _unknown(label) and _label(label, ("False", "True"), where) == "True" else ()
        yield Example(where, " ".join(words), None if _unknown(label) else referent, answers, text)


def squad(path: Path) -> Iterator[Example]:
    """One example for each question of a SQuAD v1.1 .json file or an MRQA .jsonl file; spaces around punctuation."""
    for where, context, qa in _questions(path):
        question = _get(qa, "question", str, where)
        answers = [_get(a, "text", str, where) if isinstance(a, dict) else a for a in _many(qa, "answers", where)]
        if not all(isinstance(answer, str) and answer.strip() for answer in answers):
            raise DataError(f"{where}: expected answers that are texts, found {answers!r:.60}")
        first = [_get(found, "text", str, where) for found in _many(qa, "detected_answers", where)][:1] or answers[:1]
        target = spaced(first[0]) if answers else None
        joined = f"question: {spaced(question)} context: {spaced(context)}"
        yield Example(where, joined, target, tuple(map(spaced, answers)))


def spaced(text: str) -> str:
    """A text with spaces around its punctuation, and its white space folded."""
    return BLANKS.sub(" ", PUNCTUATION.sub(r" \1 ", text)).strip(" ")


def _questions(path: Path) -> Iterator[tuple[str, str, dict]]:
    """Where each question is, its context, and the object that holds it and its answers."""
    if ".jsonl" in path.suffixes:
        for number, line in data.records(path):
            where = f"{path}: row {number}"
            if "header" not in line:
                context = _get(line, "context", str, where)
                yield from ((where, context, qa) for qa in _get(line, "qas", list, where))
        return
    try:
        whole = json.loads(data.read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not valid JSON ({error}); expected a SQuAD .json or an MRQA .jsonl file") from None
    for i, article in enumerate(_get(whole, "data", list, str(path)), 1):
        for k, paragraph in enumerate(_get(article, "paragraphs", list, f"{path}: article {i}"), 1):
            where = f"{path}: article {i}, paragraph {k}"
            context = _get(paragraph, "context", str, where)
            for qa in _get(paragraph, "qas", list, where):
                yield f"{where}, question {qa.get('id') if isinstance(qa, dict) else qa}", context, qa


TREC_CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")


def trec(path: Path) -> Iterator[Example]:
    """Lines "COARSE:fine question", in Latin-1; the six coarse classes."""
    for number, line in enumerate(data.read_text(path, "latin-1").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: row {number}"
        code, _, question = line.strip().partition(" ")
        coarse, colon, _ = code.partition(":")
        if coarse not in TREC_CLASSES or not colon or not question.strip():
            raise DataError(f"{where}: expected 'COARSE:fine question', COARSE one of {', '.join(TREC_CLASSES)}")
        yield Example(where, f"text: {question}", TREC_CLASSES.index(coarse))


def agnews(path: Path) -> Iterator[Example]:
    """The .csv files of Zhang et al. 2015, with or without a header line: class 1 to 4, title, description.

    Also .tsv files without one: description, class.
    """
    if ".tsv" in path.suffixes:
        yield from table("description", header=("description", "label"))(path)
        return
    names = ("Class Index", "Title", "Description")
    for number, record in data.records(path, names):
        where = f"{path}: row {number}"
        if tuple(record.values()) == names:
            continue
        code = _get(record, names[0], str, where)
        if code not in ("1", "2", "3", "4"):
            raise DataError(f"{where}: class {code!r}: expected 1, 2, 3 or 4")
        yield Example(where, f"description: {record['Description']} title: {record['Title']}", int(code) - 1)


DETERMINERS = set(
    "a an few her his each every many much my our some that the their these this those which whose your".split()  # noqa: SIM905
)


def _words(text: str) -> set[str]:
    """The different words of a text but for determiners, in lower case."""
    return set(text.lower().split()) - DETERMINERS


def _means(predicted: str, referent: str) -> bool:
    """Whether an answer means a referent: one has all words of the other, neither or both a genitive (T5's rule)."""
    one, other = _words(predicted), _words(referent)
    return ("'" in predicted) == ("'" in referent) and bool(one and other) and (one <= other or other <= one)


def _referent_accuracy(predicted: Sequence[str], rows: Sequence[Row], labels: Sequence[str]) -> float:
    """Share of rows where the answer means the referent if, and only if, it is the true one; no answer is wrong."""
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
    "cola": Task(
        table("sentence", header=("source", "label", "mark", "sentence")), MATTHEWS, ("unacceptable", "acceptable")
    ),
    "glue-rte": Task(table("sentence1", "sentence2"), ACCURACY, ENTAILMENT),
    "mrpc": Task(
        table("sentence1", "sentence2", label="label|Quality", sentence1="#1 String", sentence2="#2 String"),
        F1 | ACCURACY,
        ("not_equivalent", "equivalent"),
    ),
    "qqp": Task(
        table("question1", "question2", label="label|is_duplicate", question1="text_a", question2="text_b"),
        F1 | ACCURACY,
        ("not_duplicate", "duplicate"),
    ),
    "sst2": Task(table("sentence"), ACCURACY, ("negative", "positive")),
    # Others
    "squad": Task(squad, ANSWERS),
    "trec": Task(trec, ACCURACY, ("short", "meaning", "thing", "person", "place", "number")),
    "agnews": Task(agnews, ACCURACY, ("World", "Sports", "Business", "Sci/Tech")),
}
