"""Read rows from .tsv, .csv and .jsonl files."""

import csv
import gzip
import io
import json
import logging
import lzma
import re
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyprompt import display
from tinyprompt.data import Row, check_text
from tinyprompt.errors import CheckpointError, DataError
from tinyprompt.files.io import LARGEST, regular

LONGEST = 10_000  # length limit of a target in characters
QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')  # a quoted field with a quote inside, as in CSV
_field_limit = threading.Lock()  # the limit of the csv module is global to the process


def read_rows(
    path: str | Path,
    input_column: str = "input",
    target_column: str | None = "target",
    words: Mapping[str, str] | None = None,
) -> "Rows":
    """Read the rows of a UTF-8 file with named columns: .tsv, .csv or .jsonl, also compressed (.gz or .xz).

    Args:
        path: The path of the file. TSV is read without quoting, with a warning if it looks quoted; CSV with quoting.
        input_column: The name of the column with the inputs.
        target_column: The name of the column with the targets. None gives empty targets.
        words: Label words that replace the targets, for example {"0": "bad", "1": "good"}.

    Returns:
        The rows, as a list that a notebook shows as a table.

    Raises:
        DataError: A row cannot be used. The message names the file and the row.

    Example:
        >>> rows = read_rows("train.tsv", words={"0": "bad", "1": "good"})
    """
    rows = [row_of(record, input_column, target_column, words, where) for where, record in records(path)]
    if not rows:
        raise DataError(f"{path}: no rows")
    quoted = [text for row in rows for text in (row.input, row.target) if QUOTED.fullmatch(text)]
    if quoted and kind_of(path) != ".csv":
        told = "look quoted, as in a .csv; the quotes were kept"
        logging.getLogger("tinyprompt").warning("warning: %s: %d texts %s: %.60s", path, len(quoted), told, quoted[0])
    return Rows(rows)


class Rows(list[Row]):
    """A list of rows. A notebook shows it as a table."""

    def _repr_html_(self) -> str:
        first = [(row.input, row.target) for row in self[: display.SHOWN]]
        return display.table([*first, (f"{len(self)} rows", "")], ("input", "target"))


def row_of(
    record: Mapping[str, Any], input: str, target: str | None, words: Mapping[str, str] | None, where: str
) -> Row:
    """Build the Row of a record. Raises DataError, with `where`, if a column is missing or is not a text."""
    values: list[str] = []
    for column in (input, target):
        if column is None:
            values.append("")
            continue
        if column not in record and len(record) == 1 and ";" in next(iter(record)):
            raise DataError(f"{where}: one column, {next(iter(record))!r}: separated by semicolons; expected commas")
        if column not in record:
            found = ", ".join(repr(str(k)) for k in record)
            advice = "name yours with --input or --target, or a built-in task with --task"
            raise DataError(f"{where}: no column {column!r}; found {found}; {advice}")
        value = record[column]
        # NaN differs from itself; pandas' NA cannot be compared.
        missing = value is None or type(value).__name__ == "NAType" or value != value or not str(value).strip()
        if missing or isinstance(value, bool | np.bool | list | dict):
            raise DataError(f"{where}: column {column!r}: expected a text, found {value!r}")
        if isinstance(value, float | np.floating) and float(value).is_integer():
            value = int(value)  # JSON's 1.0 equals 1, and pandas converts 1 to 1.0 in a column with gaps
        check_text(str(value), f"{where}: column {column!r}")
        values.append(str(value).strip())
    if len(values[1]) > LONGEST:
        found = f"{len(values[1]):,} characters; at most {LONGEST:,} can be learned"
        raise DataError(f"{where}: column {target!r}: a target of {found}")
    if words and target is not None:
        if values[1] not in words and values[1] not in words.values():
            raise DataError(f"{where}: target {values[1]!r} has no label word; given for {', '.join(sorted(words))}")
        values[1] = words.get(values[1], values[1])
    return Row(values[0], values[1])


def read_text(path: str | Path, encoding: str = "utf-8-sig") -> str:
    """Read the text of a file, which may be compressed (.gz, .xz). Raises DataError."""
    path = Path(path)
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    try:
        with opener(regular(path), "rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise DataError(f"{path}: contains more than {LARGEST:,} bytes, the limit; split it")
        return decoded(content, str(path), encoding)
    except CheckpointError as error:
        raise DataError(str(error)) from None
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise DataError(f"{path}: cannot be decompressed ({error}); download it again") from None


def decoded(content: bytes, where: str, encoding: str = "utf-8-sig") -> str:
    """Decode bytes and remove the byte order mark of UTF-8. Raises DataError, with `where`, for other encodings."""

    def row(content: bytes, end: int) -> int:
        return len(re.findall(rb"\r\n?|\n", content[:end])) + 1

    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{where}: is UTF-16; convert it to UTF-8 first")
    if b"\0" in content:
        told = "contains a NUL byte, as UTF-16 does; convert it to UTF-8, or remove the byte"
        raise DataError(f"{where}: row {row(content, content.index(0))}: {told}")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: row {row(error.object, error.start)}: not UTF-8; convert it first") from None


def parsed(text: str, where: str, expected: str) -> Any:
    """Parse JSON. Raises DataError, with `where`, for invalid JSON, a repeated key, or an unpaired surrogate."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
        if twice:
            raise DataError(f"{where}: the key {twice[0]!r} occurs twice; keep one")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); expected {expected}") from None
    if "\\u" in text:
        check_text(json.dumps(value, ensure_ascii=False), where)
    return value


def kind_of(path: str | Path) -> str:
    """Return the suffix of a file, without the suffix of its compression."""
    path = Path(path)
    return Path(path.stem if path.suffix.lower() in (".gz", ".xz") else path.name).suffix.lower()


def records(
    path: str | Path, columns: Sequence[str] | None = None, broken: Callable[[int], None] | None = None
) -> Iterator[tuple[str, dict]]:
    """Yield each record of a .tsv (or .txt), .csv or .jsonl file with its place, `PATH: row NUMBER`.

    Args:
        path: The path of the file.
        columns: The names of the fields, for a file without a header line.
        broken: Called with the line number of each row that has the wrong number of fields; such rows are skipped.
            Without it, they are an error.

    Raises:
        DataError: The file or a row is invalid.
    """
    path, kind = Path(path), kind_of(path)
    if kind not in (".tsv", ".txt", ".csv", ".jsonl"):
        raise DataError(f"{path}: expected a file that ends in .tsv, .csv or .jsonl")
    with io.StringIO(read_text(path), newline="") as file:
        if kind == ".jsonl":
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}: row {number}"
                record = parsed(line, where, "one object on each line, with nothing between them")
                if not isinstance(record, dict):
                    raise DataError(f"{where}: expected a JSON object on each line, found {line.strip()[:40]!r}")
                yield where, record
            return
        lines = iter(fields_of(file, path, quoted=kind == ".csv"))
    _, header = (0, columns) if columns else next(lines, (0, []))
    check_header(header, path)
    for number, fields in lines:
        if not any(map(str.strip, fields)):
            continue
        where = f"{path}: row {number}"
        if fields == header and len(header) > 1 and not columns:
            raise DataError(f"{where}: repeats the header; remove it")
        if len(fields) != len(header) and broken:
            broken(number)
            continue
        if len(fields) != len(header):
            wanted = f"{'expected' if columns else 'but the header names'} {len(header)}: {', '.join(header)}"
            raise DataError(f"{where}: {len(fields)} fields, {wanted}")
        yield where, dict(zip(header, fields, strict=True))


def fields_of(file: io.StringIO, path: Path, quoted: bool) -> list[tuple[int, list[str]]]:
    """Return the line number and the fields of each line. Raises DataError for a misplaced quote.

    Python limits a field to 131,072 characters in the whole process. The limit is raised here and restored.
    """
    quotes: dict[str, Any] = {"strict": True} if quoted else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(file, **quotes)
    other = csv.reader(io.StringIO(file.getvalue(), newline=""), skipinitialspace=True, **quotes)
    found: list[tuple[int, list[str]]] = []
    row = 1
    with _field_limit:
        before = csv.field_size_limit(LARGEST)
        try:
            for fields, spaced in zip(reader, other, strict=False):
                if quoted and [x.lstrip(" ") for x in fields] != [x.lstrip(" ") for x in spaced]:
                    raise csv.Error("there is a space before it")
                found.append((reader.line_num, fields))
                row = reader.line_num + 1
            return found
        except csv.Error as error:
            told = 'close each quote, and write a quote inside a text as two ("")'
            raise DataError(f"{path}: row {row}: a quote is misplaced or never closed ({error}); {told}") from None
        finally:
            csv.field_size_limit(before)


def check_header(header: Sequence[str], path: Path) -> None:
    """Raise DataError for a file without column names, or with a repeated name. Unnamed columns may repeat."""
    if not header:
        raise DataError(f"{path}: empty; expected a header line with column names")
    twice = next((name for name, times in Counter(header).items() if name and times > 1), None)
    if twice:
        raise DataError(f"{path}: the header names {twice!r} twice; rename one of these columns")
