"""Rows from .tsv, .csv and .jsonl files."""

import csv
import gzip
import io
import json
import lzma
import stat
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyprompt import display
from tinyprompt.data import Row, check_text
from tinyprompt.errors import DataError

LARGEST = 2**28  # bytes of a decompressed file
LONGEST = 10_000  # characters of a target
_field_limit = threading.Lock()  # csv's limit belongs to the process


def read_rows(
    path: str | Path,
    input_column: str = "input",
    target_column: str | None = "target",
    words: Mapping[str, str] | None = None,
) -> "Rows":
    """Read the rows of a .tsv, .csv or .jsonl file (also .gz or .xz), UTF-8, with named columns.

    TSV is read without quoting, CSV with it. `words` replaces targets, e.g. {"0": "bad", "1": "good"}.
    With target_column None the targets are empty. Raises DataError that names the file and the row.
    """
    rows = [
        row_of(record, input_column, target_column, words, f"{path}: row {number}") for number, record in records(path)
    ]
    if not rows:
        raise DataError(f"{path}: no rows")
    return Rows(rows)


class Rows(list[Row]):
    """A list of rows. A notebook shows it as a table."""

    def _repr_html_(self) -> str:
        first = [(row.input, row.target) for row in self[: display.SHOWN]]
        return display.table([*first, (f"{len(self)} rows", "")], ("input", "target"))


def row_of(
    record: Mapping[str, Any], input: str, target: str | None, words: Mapping[str, str] | None, where: str
) -> Row:
    """Build the Row of a record. Raises DataError, with `where`, for a column that is missing or is not a text."""
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
        # NaN is not equal to itself; pandas' NA cannot be compared.
        missing = value is None or type(value).__name__ == "NAType" or value != value or not str(value).strip()
        if missing or isinstance(value, bool | list | dict):
            raise DataError(f"{where}: column {column!r}: expected a text, found {value!r}")
        values.append(str(value).strip())
    if len(values[1]) > LONGEST:
        found = f"{len(values[1]):,} characters; the most that can be learned is {LONGEST:,}"
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


def records(
    path: str | Path, columns: Sequence[str] | None = None, broken: Callable[[int], None] | None = None
) -> Iterator[tuple[int, dict]]:
    """Yield each record of a .tsv (or .txt), .csv or .jsonl file with its line number.

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
        lines = iter(fields_of(file, path, quoted=kind == ".csv"))
    _, header = (0, columns) if columns else next(lines, (0, []))
    check_header(header, path)
    for number, fields in lines:
        if not any(fields):
            continue
        if len(fields) != len(header) and broken:
            broken(number)
            continue
        if len(fields) != len(header):
            wanted = f"{'expected' if columns else 'but the header names'} {len(header)}: {', '.join(header)}"
            raise DataError(f"{path}: row {number}: {len(fields)} fields, {wanted}")
        yield number, dict(zip(header, fields, strict=True))


def fields_of(file: io.StringIO, path: Path, quoted: bool) -> list[tuple[int, list[str]]]:
    """Return the line number and the fields of each line. Raises DataError.

    Python limits a field to 131,072 characters for the whole process. The limit is raised here and restored.
    """
    reader = csv.reader(file) if quoted else csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    with _field_limit:
        before = csv.field_size_limit(LARGEST)
        try:
            return [(reader.line_num, fields) for fields in reader]
        except csv.Error as error:
            raise DataError(f"{path}: row {reader.line_num}: {error}") from None
        finally:
            csv.field_size_limit(before)


def check_header(header: Sequence[str], path: Path) -> None:
    """Raise DataError for a file without column names, or with a name twice. Unnamed columns may repeat."""
    if not header:
        raise DataError(f"{path}: empty; expected a header line with column names")
    twice = next((name for name, times in Counter(header).items() if name and times > 1), None)
    if twice:
        raise DataError(f"{path}: the header names {twice!r} twice; rename one of these columns")
