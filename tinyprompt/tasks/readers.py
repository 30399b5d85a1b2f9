"""Readers of data sets in their published form. They convert files to examples in T5's text formats.

The formats are those of t5.data.preprocessors without the task name, as in Lester et al. 2021. Columns appear with
their names, "hypothesis: ... premise: ...", in sorted order by default. Texts are stripped of white space.
"""

import io
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinyprompt.errors import DataError
from tinyprompt.files import tables

PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
BLANKS = re.compile(r"[\t\n\f\r ]+")


class Example(NamedTuple):
    """A row of a file. The target is the code or the word of a label, or a text, or None if it is missing."""

    where: str
    input: str
    target: Any
    answers: tuple[str, ...] = ()
    group: str = ""


def label_of(value: Any, labels: Sequence[str], where: str) -> str:
    """Return the label word for a word or a code 0, 1, ... (also as a string or a bool). Raises DataError."""
    if value in labels and isinstance(value, str):
        return value
    code = int(value) if isinstance(value, bool) or str(value) in map(str, range(len(labels))) else None
    if code is None:
        codes = ", ".join(f"{i} or {label!r}" for i, label in enumerate(labels))
        raise DataError(f"{where}: label {value!r}: expected one of {codes}")
    return labels[code]


def _get(record: Any, key: str, kind: type, where: str, empty: bool = False) -> Any:
    """Return a value of a JSON object or a record. `empty` permits empty strings. Raises DataError."""
    if not isinstance(record, dict) or key not in record:
        found = ", ".join(map(repr, record)) if isinstance(record, dict) else repr(record)[:40]
        raise DataError(f"{where}: expected {key!r}, found {found}; is this a file of that task (--task)?")
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool) or (kind is str and not empty and not str(value).strip()):
        name = {str: "a text", list: "a list", dict: "an object", int: "a whole number"}[kind]
        raise DataError(f"{where}: {key!r}: expected {name}, found {value!r:.40}")
    return value


def cola(path: Path) -> Iterator[Example]:
    """Read CoLA's files: source, label, mark, sentence, without header. The test file has a header."""
    first = tables.read_text(path).partition("\n")[0].split("\t")
    header = None if "sentence" in first else ("source", "label", "mark", "sentence")
    return table("sentence", header=header)(path)


def _many(record: dict, key: str, where: str) -> list:
    """Return the list under an optional key. Raises DataError."""
    return [] if record.get(key) is None else _get(record, key, list, where)


def _known(label: Any) -> Any:
    """Return the value of a label, or None if it means that the row has no label."""
    return None if label in ("", -1, "-1") else label


def table(
    *keys: str, label: str = "label", header: Sequence[str] | None = None, broken: bool = False, **columns: str
) -> Callable[..., Any]:
    """Build a reader for a file with columns. In the input, each text follows the name of its key.

    Args:
        *keys: The names of the text columns, in order.
        label: The possible names of the label column, separated by "|".
        header: The names of all columns, for a file without a header line.
        broken: Skip rows with the wrong number of fields, which some data sets contain, and log their number.
        **columns: Alternative column names by key.
    """

    def examples(path: Path) -> Iterator[Example]:
        skipped: list[int] = []
        for where, record in tables.records(path, header, skipped.append if broken else None):
            names = {key: columns[key] if columns.get(key) in record else key for key in keys}
            texts = [f"{key}: {_get(record, name, str, where)}" for key, name in names.items()]
            target = next((record[name] for name in label.split("|") if name in record), None)
            if target is None and "answer" in record and "passage" in keys:
                raise DataError(
                    f"{where}: has 'answer' instead of 'label', as in the first release of BoolQ; name SuperGLUE's file"
                )
            yield Example(where, " ".join(texts), _known(target))
        if skipped:
            told = f"skipped {len(skipped)} rows with too many or too few fields, the first at line {skipped[0]}"
            logging.getLogger("tinyprompt").warning("warning: %s: %s", path, told)

    return examples


def multirc(path: Path) -> Iterator[Example]:
    """Yield one example for each candidate answer, without tags. The answers to a question form a group."""
    for where, record in tables.records(path):
        passage = _get(record, "passage", dict, where)
        item = record.get("idx", where.rpartition(" ")[2])
        text = _get(passage, "text", str, where)
        for q in _get(passage, "questions", list, where):
            question, group = _get(q, "question", str, where), str(_get(q, "idx", int, where))
            for answer in _get(q, "answers", list, f"{where}: question {group}"):
                here = f"{where}: question {group}"
                joined = f"question: {question} answer: {_get(answer, 'text', str, here, empty=True)} paragraph: {text}"
                joined = re.sub("</?b>", "", joined.replace("<br>", " "))
                yield Example(here, joined, _known(answer.get("label")), group=f"{item}-{group}")


def record(path: Path) -> Iterator[Example]:
    """Yield one example for each query of ReCoRD, with all its answers."""
    for where, line in tables.records(path):
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
    """Yield the text with its *pronoun* marked, and the referent, which is a target only if it is the true referent.

    Some spans do not occur in their texts, and some indices are off by one. They are corrected as in TFDS and T5.
    """
    for where, record in tables.records(path):
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
        label = _known(record.get("label"))
        answers = (referent,) if label is not None and label_of(label, ("False", "True"), where) == "True" else ()
        yield Example(where, " ".join(words), None if label is None else referent, answers, text)


def squad(path: Path) -> Iterator[Example]:
    """Yield one example for each question of a SQuAD v1.1 .json or MRQA .jsonl file, with spaces around punctuation."""
    for where, context, qa in _questions(path):
        question = _get(qa, "question", str, where)
        answers = [_get(a, "text", str, where) if isinstance(a, dict) else a for a in _many(qa, "answers", where)]
        if not all(isinstance(answer, str) and answer.strip() for answer in answers):
            raise DataError(f"{where}: expected answers that are texts, found {answers!r:.60}")
        if qa.get("is_impossible") is True:
            raise DataError(f"{where}: has no answer (is_impossible): SQuAD 2.0 is not supported; use v1.1 or MRQA")
        first = [_get(found, "text", str, where) for found in _many(qa, "detected_answers", where)][:1] or answers[:1]
        target = spaced(first[0]) if answers else None
        joined = f"question: {spaced(question)} context: {spaced(context)}"
        yield Example(where, joined, target, tuple(map(spaced, answers)))


def spaced(text: str) -> str:
    """Put spaces around punctuation and collapse white space."""
    return BLANKS.sub(" ", PUNCTUATION.sub(r" \1 ", text)).strip(" ")


def _questions(path: Path) -> Iterator[tuple[str, str, dict]]:
    """Yield the location of each question, its context, and its object."""
    if ".jsonl" in path.suffixes:
        for where, line in tables.records(path):
            if "header" not in line:
                context = _get(line, "context", str, where)
                yield from ((where, context, qa) for qa in _get(line, "qas", list, where))
        return
    whole = tables.parsed(tables.read_text(path), str(path), "a SQuAD .json or an MRQA .jsonl file")
    for i, article in enumerate(_get(whole, "data", list, str(path)), 1):
        for k, paragraph in enumerate(_get(article, "paragraphs", list, f"{path}: article {i}"), 1):
            where = f"{path}: article {i}, paragraph {k}"
            context = _get(paragraph, "context", str, where)
            for qa in _get(paragraph, "qas", list, where):
                yield f"{where}, question {qa.get('id') if isinstance(qa, dict) else qa}", context, qa


TREC_CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")


def trec(path: Path) -> Iterator[Example]:
    """Read Latin-1 lines "COARSE:fine question" with six coarse classes."""
    for number, line in enumerate(io.StringIO(tables.read_text(path, "latin-1"), newline=None), 1):
        if not line.strip():
            continue
        where = f"{path}: row {number}"
        code, _, question = line.strip().partition(" ")
        coarse, colon, _ = code.partition(":")
        if coarse not in TREC_CLASSES or not colon or not question.strip():
            raise DataError(f"{where}: expected 'COARSE:fine question', COARSE one of {', '.join(TREC_CLASSES)}")
        yield Example(where, f"text: {question}", TREC_CLASSES.index(coarse))


def agnews(path: Path) -> Iterator[Example]:
    """Read the .csv files of Zhang et al. 2015, with or without a header: class 1 to 4, title, description.

    Also read .tsv files without a header: description, class.
    """
    if ".tsv" in path.suffixes:
        yield from table("description", header=("description", "label"))(path)
        return
    names = ("Class Index", "Title", "Description")
    for where, record in tables.records(path, names):
        if tuple(record.values()) == names:
            continue
        code = _get(record, names[0], str, where)
        if code not in ("1", "2", "3", "4"):
            raise DataError(f"{where}: class {code!r}: expected 1, 2, 3 or 4")
        yield Example(where, f"description: {record['Description']} title: {record['Title']}", int(code) - 1)
