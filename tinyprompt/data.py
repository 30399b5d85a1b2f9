"""Rows from files, and batches from rows."""

import csv
import gzip
import io
import json
import lzma
import re
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinyprompt.errors import DataError
from tinyprompt.tokenizer import PAD, Tokenizer

if TYPE_CHECKING:
    from tinyprompt.settings import Settings

MAX_LABELS = 50
LARGEST = 2**28  # bytes of a file of rows, once it is decompressed
LONGEST = 10_000  # characters of a target
TEMPLATE = "{input} answer: {target}"  # how a solved example reads in front of an input
TASKS = ("auto", "classify", "generate")  # of files of columns: label words found, wanted or not
csv.field_size_limit(LARGEST)  # characters; Python's own limit of 131,072 is less than a document may have
NO_IDS: Mapping[str, Sequence[int]] = MappingProxyType({})


class Row(NamedTuple):
    """One example: text in, text out."""

    input: str
    target: str
    answers: tuple[str, ...] = ()  # of a question: all that are right
    group: str = ""  # rows of one group are scored, and split, together
    task: str = ""  # in a mixture: whose row it is


class Batch(NamedTuple):
    """Padded ids of some rows. Shapes: input_ids, attention_mask (B, L); labels, weights (B, T)."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray
    weights: np.ndarray  # float32: 1 at label tokens, 0 at padding


def read_rows(
    path: str | Path,
    input_column: str = "input",
    target_column: str | None = "target",
    words: Mapping[str, str] | None = None,
) -> list[Row]:
    """Rows of a .tsv, .csv or .jsonl file (also .gz or .xz), UTF-8, with named columns.

    TSV is read without quoting, CSV with it. `words` replaces targets, e.g. {"0": "bad", "1": "good"}.
    With target_column None the targets are empty. Raises DataError that names the file and the row.
    """
    path = Path(path)
    rows = []
    for number, record in records(path):
        here = f"{path}: row {number}"
        values: list[str] = []
        for column in (input_column, target_column):
            if column is None:
                values.append("")
                continue
            if column not in record and len(record) == 1 and ";" in next(iter(record)):
                raise DataError(f"{here}: one column, {next(iter(record))!r}: separated by semicolons; expected commas")
            if column not in record:
                found = ", ".join(repr(str(k)) for k in record)
                advice = "name yours with --input or --target, or a built-in task with --task"
                raise DataError(f"{here}: no column {column!r}; found {found}; {advice}")
            value = record[column]
            missing = value is None or value != value or not str(value).strip()  # JSON of Python may have NaN
            if missing or isinstance(value, bool | list | dict):
                raise DataError(f"{here}: column {column!r}: expected a text, found {value!r}")
            values.append(str(value).strip())
        if len(values[1]) > LONGEST:
            found = f"{len(values[1]):,} characters; the most that can be learned is {LONGEST:,}"
            raise DataError(f"{here}: column {target_column!r}: a target of {found}")
        if words and target_column is not None:
            if values[1] not in words:
                raise DataError(f"{here}: target {values[1]!r} has no label word; given for {', '.join(sorted(words))}")
            values[1] = words[values[1]]
        rows.append(Row(values[0], values[1]))
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def read_text(path: str | Path, encoding: str = "utf-8-sig") -> str:
    """The text of a file, which may be compressed (.gz, .xz). Raises DataError."""
    path = Path(path)
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise DataError(f"{path}: is a device or a pipe; expected a file")
        with opener(path, "rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise DataError(f"{path}: holds more than {LARGEST:,} bytes, the most that is read; split it")
        return content.decode(encoding)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a directory; expected a file of rows") from None
    except UnicodeDecodeError as error:
        row = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: row {row}: not UTF-8; convert it first") from None
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise DataError(f"{path}: cannot be decompressed ({error}); fetch it again") from None


def check_text(text: str, where: str) -> None:
    """Raise DataError for a text that is no UTF-8: it has one half of a character (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = text[error.start : error.end].encode("unicode_escape").decode()
        raise DataError(f"{where}: holds {broken}, half of a character; write the text in UTF-8") from None


def records(
    path: str | Path, columns: Sequence[str] | None = None, broken: Callable[[int], None] | None = None
) -> Iterator[tuple[int, dict]]:
    """Each record of a .tsv (or .txt), .csv or .jsonl file with its line number.

    columns: the names of the fields of a file without a header line. broken: is told the line numbers of rows with too
    many or too few fields, which are left out; without it they are an error. Raises DataError.
    """
    path = Path(path)
    packed = path.suffix.lower() in (".gz", ".xz")
    kind = Path(path.stem if packed else path.name).suffix.lower()
    if kind not in (".tsv", ".txt", ".csv", ".jsonl"):
        raise DataError(f"{path}: expected a file that ends in .tsv, .csv or .jsonl")
    with io.StringIO(read_text(path), newline="") as file:
        if kind == ".jsonl":
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}: row {number}: not valid JSON ({error})") from None
                if "\\u" in line:
                    check_text(json.dumps(record, ensure_ascii=False), f"{path}: row {number}")
                if not isinstance(record, dict):
                    raise DataError(f"{path}: row {number}: expected a JSON object, found {line.strip()[:40]!r}")
                yield number, record
            return
        reader = csv.reader(file) if kind == ".csv" else csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            header = columns or next(reader, [])
            check_header(header, path)
            for fields in reader:
                if not any(fields):
                    continue
                if len(fields) != len(header) and broken:
                    broken(reader.line_num)
                    continue
                if len(fields) != len(header):
                    wanted = f"{'expected' if columns else 'but the header names'} {len(header)}: {', '.join(header)}"
                    raise DataError(f"{path}: row {reader.line_num}: {len(fields)} fields, {wanted}")
                yield reader.line_num, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}: row {reader.line_num}: {error}") from None


def check_header(header: Sequence[str], path: Path) -> None:
    """Raise DataError for a file without column names, or with one twice; those without a name may be many."""
    if not header:
        raise DataError(f"{path}: empty; expected a header line with column names")
    twice = next((name for name, times in Counter(header).items() if name and times > 1), None)
    if twice:
        raise DataError(f"{path}: the header names {twice!r} twice; rename one of these columns")


def read(source: str | Path | Sequence[Row]) -> list[Row]:
    """Rows as they are, or those of a file with the columns `input` and `target`. Raises DataError."""
    if isinstance(source, str | Path):
        return read_rows(source)
    for row in source:
        if not isinstance(row, Row):
            raise DataError(f"row {row!r:.60}: expected Row(input, target), or the name of a file")
    return list(source)


def label_words(rows: Sequence[Row], task: str = "auto") -> tuple[str, ...] | None:
    """The distinct targets, sorted, if they are labels to choose from; None for free text.

    task: "classify" takes them for labels, "generate" for text. "auto" takes at most 50 different targets, each seen
    four times on average, for labels.
    """
    found = sorted({row.target for row in rows})
    few = 2 <= len(found) <= min(MAX_LABELS, len(rows) / 4)
    return tuple(found) if task == "classify" or (task == "auto" and few) else None


def split(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows in two random parts; the second has `share` of them (at least one), and of every target that repeats."""
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    of: dict[str, list[int]] = {}
    for i in order:
        of.setdefault(rows[i].target, []).append(i)
    # Each target's rows are spread evenly over 0 to 1; the second part is what lies below the share.
    place = {i: (k + 0.5) / len(places) for places in of.values() for k, i in enumerate(places)}
    order = sorted(order, key=place.__getitem__)
    cut = max(1, round(len(rows) * share))
    return [rows[i] for i in sorted(order[cut:])], [rows[i] for i in sorted(order[:cut])]


def width(longest: int) -> int:
    """How long rows are padded to: one of few lengths, since each is a graph of its own, and a short one is exact."""
    multiple = 1 if longest <= 4 else 4 if longest <= 32 else 8
    return -(-longest // multiple) * multiple


def pad(sequences: Sequence[Sequence[int]], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Ids (B, L), padded on the right with 0, and their mask of 1 and 0. L: the `width` of the longest, or `length`."""
    if not len(sequences):
        raise DataError("no rows: expected at least one")
    out = np.full((len(sequences), length or width(max(map(len, sequences)))), PAD)
    mask = np.zeros(out.shape, np.int64)
    for row, ids in enumerate(sequences):
        out[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    return out, mask


def encode_inputs(texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int) -> list[list[int]]:
    """Ids of each text; longer ones lose their end, but keep eos. Raises TypeError, DataError for what is no text."""
    if isinstance(texts, str):
        raise TypeError(f"expected a list of texts, found the text {texts!r:.60}")
    for i, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise TypeError(f"text {i}: expected a text, found {text!r:.60}")
        check_text(text, f"text {i}")
    return [
        ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]] for ids in map(tokenizer.encode, texts)
    ]


def in_context(
    texts: Sequence[str], shots: Sequence[Row], template: str, tokenizer: Tokenizer, max_tokens: int
) -> list[str]:
    """Each text behind some solved examples, as GPT-3 is prompted (Brown et al. 2020, arXiv:2005.14165, section 2).

    template: how an example reads, with {input} and then {target}; the last one ends where its target would begin.
    Raises DataError for another template, or where a text with its examples exceeds max_tokens.
    """
    field = re.compile(r"\{(input|target)\}")
    if field.findall(template) != ["input", "target"]:
        raise DataError(f"template {template!r}: expected {{input}} once, and {{target}} once after it")

    def filled(template: str, row: Row) -> str:
        return field.sub(lambda found: getattr(row, found[1]), template)

    solved = [filled(template, row) for row in shots]
    question = template.partition("{target}")[0].rstrip()
    out = ["\n".join([*solved, filled(question, Row(text, ""))]) for text in texts]
    longest = max(out, key=lambda text: len(tokenizer.encode(text)), default="")
    tokens = len(tokenizer.encode(longest))
    if tokens > max_tokens:
        raise DataError(
            f"the input that ends in {longest[-40:]!r} has {tokens} tokens with its {len(shots)} examples, but only "
            f"{max_tokens} are read; take fewer or shorter examples, or read more tokens"
        )
    return out


def by_length(lengths: Sequence[int], size: int) -> list[np.ndarray]:
    """Indices in batches of `size`, in order of length, so that hardly any padding is computed."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    return [order[i : i + size] for i in range(0, len(order), size)]


def batch_of(
    rows: Sequence[Row], tokenizer: Tokenizer, max_tokens: int, target_ids: Mapping[str, Sequence[int]] = NO_IDS
) -> Batch:
    """Rows as one batch. target_ids: ids of targets that the tokenizer is not asked for."""
    input_ids, mask = pad(encode_inputs([row.input for row in rows], tokenizer, max_tokens))
    labels, weights = pad([target_ids.get(row.target) or tokenizer.encode(row.target) for row in rows])
    return Batch(input_ids, mask, labels, weights.astype(np.float32))


def batches_in_order_of_length(rows: Sequence[Row], tokenizer: Tokenizer, max_tokens: int) -> Iterator[Batch]:
    """All rows once, in batches of 64 that are nearly free of padding."""
    lengths = [len(tokenizer.encode(row.input)) for row in rows]
    return (batch_of([rows[i] for i in chosen], tokenizer, max_tokens) for chosen in by_length(lengths, 64))


def training_batches(
    rows: Sequence[Row], tokenizer: Tokenizer, settings: "Settings", target_ids: Mapping[str, Sequence[int]] = NO_IDS
) -> Iterator[Batch]:
    """Batches without end. Every epoch reshuffles; rows of similar length share a batch; each batch is full.

    A pool of eight batches is cut from the shuffled rows and sorted by length, so that batches stay
    random but are nearly free of padding. The last rows of an epoch open the next one.
    """
    size = settings.batch_size
    inputs = encode_inputs([row.input for row in rows], tokenizer, settings.max_input_tokens)
    targets = [target_ids.get(row.target) or tokenizer.encode(row.target) for row in rows]
    rng = np.random.default_rng(settings.seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < 8 * size:
            waiting += rng.permutation(len(rows)).tolist()
        pool, waiting = np.array(waiting[: 8 * size]), waiting[8 * size :]
        batches = by_length([len(inputs[i]) for i in pool], size)
        for i in rng.permutation(len(batches)):
            chosen = pool[batches[i]]
            input_ids, mask = pad([inputs[i] for i in chosen])
            labels, weights = pad([targets[i] for i in chosen])
            yield Batch(input_ids, mask, labels, weights.astype(np.float32))


def random_batch(vocab_size: int, rows: int, tokens: int, targets: int, seed: int = 0) -> Batch:
    """A random batch: full in its first row, padded on the right in the others, but on the left in the last one.

    Shapes: input_ids (rows, tokens), labels (rows, targets).
    """
    rng = np.random.default_rng(seed)

    def mask_of(width):
        lengths = np.r_[width, rng.integers(1, width + 1, rows - 1)]
        return (np.arange(width) < lengths[:, None]).astype(np.int64)

    mask, weights = mask_of(tokens), mask_of(targets)
    mask[1:][-1:] = mask[1:][-1:, ::-1]
    ids = rng.integers(3, vocab_size, mask.shape) * mask
    labels = rng.integers(3, vocab_size, weights.shape) * weights
    return Batch(ids, mask, labels, weights.astype(np.float32))
