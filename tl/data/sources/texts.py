"""Rows of CSV, TSV and JSON Lines files as Arrow columns; errors with the number of the line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.csv as pc_csv
import pyarrow.json as pc_json

from tl.data.errors import DataError
from tl.data.folder import count, is_image_name

# One row is at most so long: nothing that describes one image comes near.
LONGEST_LINE = 4 << 20
SAMPLE_ROWS = 1000
SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon"}
TEXT = pa.large_string()


def open_file(file: Path) -> BinaryIO:
    """Bytes of a file, unpacked where its name ends in .gz."""
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


def kind_of(file: Path) -> str:
    """csv, tsv, jsonl or parquet."""
    name = file.name.lower().removesuffix(".gz")
    kind = name.rpartition(".")[2]
    return {"ndjson": "jsonl", "pq": "parquet", "txt": "csv"}.get(kind, kind)


def sample_rows(file: Path) -> pa.Table:
    """The first rows, all columns as text (CSV) or as they are (JSON Lines)."""
    head = _head(file)
    if kind_of(file) == "jsonl":
        return _json(file, pa.BufferReader(head))
    separator = _separator(file, head)
    return _csv(file, pa.BufferReader(head), separator, None)


def read_rows(file: Path, columns: Sequence[str]) -> pa.Table:
    """Some columns of all rows.

    Raises:
        DataError: It cannot be parsed; names the line.
    """
    with open_file(file) as stream:
        if kind_of(file) == "jsonl":
            return _json(file, stream).select(columns)
        return _csv(file, stream, _separator(file, _head(file)), columns)


def first_row(file: Path) -> int:
    """The number of the line in which the first row stands."""
    return 1 if kind_of(file) == "jsonl" else 2


def _head(file: Path) -> bytes:
    """The first lines."""
    lines: list[bytes] = []
    size = 0
    try:
        with open_file(file) as stream:
            while len(lines) <= SAMPLE_ROWS and size <= LONGEST_LINE:
                line = stream.readline(LONGEST_LINE + 1)
                size += len(line)
                if not line:
                    break
                if len(line) > LONGEST_LINE:
                    raise DataError(_too_long(file, len(lines) + 1))
                lines.append(line)
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{file} cannot be read: {reason.lower()}") from error
    head = b"".join(lines)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file} is UTF-16: save it as UTF-8")
    if not head.strip():
        raise DataError(f"{file} is empty")
    if b"\0" in head[:1000]:
        raise DataError(f"{file} is not text: is it really a {kind_of(file)} file?")
    return head


def _too_long(file: Path, line: int) -> str:
    return (
        f"{file}: line {line:,} has more than {LONGEST_LINE >> 20} MB; a manifest has one short "
        "line an image (images as bytes belong into Parquet)"
    )


def _separator(file: Path, head: bytes) -> str:
    """As the ending says; a CSV file may have semicolons or tabs instead."""
    if kind_of(file) == "tsv":
        return "\t"
    header = head.split(b"\n", 1)[0].decode("utf-8", "replace")
    counts = {sign: header.count(sign) for sign in SEPARATORS}
    return "," if counts[","] else max(counts, key=lambda sign: counts[sign])


def _csv(
    file: Path, stream: BinaryIO | pa.BufferReader, separator: str, columns: Sequence[str] | None
) -> pa.Table:
    header = _header(file, separator)
    wrong: list[tuple[int, int, int]] = []

    def keep(row: pc_csv.InvalidRow) -> str:
        wrong.append((row.number or 0, row.actual_columns, row.expected_columns))
        return "skip"

    try:
        table = pc_csv.read_csv(
            stream,
            pc_csv.ReadOptions(block_size=LONGEST_LINE, use_threads=False),
            pc_csv.ParseOptions(delimiter=separator, invalid_row_handler=keep),
            pc_csv.ConvertOptions(
                column_types=dict.fromkeys(header, TEXT),
                include_columns=columns,
                strings_can_be_null=True,
                null_values=[""],
            ),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError, OSError, EOFError) as error:
        raise DataError(_explained(file, error)) from error
    if wrong:
        line, found, expected = wrong[0]
        more = f" (and {count(len(wrong) - 1, 'line')} more)" if len(wrong) > 1 else ""
        raise DataError(
            f"{file}: line {line:,} has {found} columns, the header has {expected}{more}; put "
            f"quotes round cells with a {SEPARATORS[separator]}"
        )
    return table


def _header(file: Path, separator: str) -> list[str]:
    with open_file(file) as stream:
        line = stream.readline().decode("utf-8-sig", "replace").rstrip("\r\n")
    parsed = pc_csv.read_csv(
        pa.BufferReader((line + "\n").encode()),
        pc_csv.ReadOptions(autogenerate_column_names=True),
        pc_csv.ParseOptions(delimiter=separator),
    )
    cells = [str(column[0].as_py()) for column in parsed.columns] if len(parsed) else []
    images = [cell for cell in cells if is_image_name(cell.strip())]
    if images:
        raise DataError(
            f"{file}: the first line is no header ({images[0][:60]}); put the names of the columns "
            "there, such as image,label"
        )
    return cells


def _json(file: Path, stream: BinaryIO | pa.BufferReader) -> pa.Table:
    try:
        table = pc_json.read_json(
            stream, pc_json.ReadOptions(block_size=LONGEST_LINE, use_threads=False)
        )
        table.validate(full=True)  # text that is no UTF-8 is not seen before
        return table
    except (pa.ArrowInvalid, UnicodeDecodeError, OSError, EOFError) as error:
        raise DataError(_explained(file, error)) from error


def _explained(file: Path, error: Exception) -> str:
    """A sentence about a file that cannot be parsed, with the line where that is known."""
    find = _bad_json if kind_of(file) == "jsonl" else _bad_text
    try:
        where = next(_bad_lines(file, find), None)
    except (OSError, EOFError) as failure:
        return f"{file} cannot be read: {failure}"
    if where is not None:
        return where
    text = str(error).split("\n")[0]
    if "straddling" in text:
        return f"{file}: a line has more than {LONGEST_LINE >> 20} MB"
    return f"{file} cannot be parsed: {text[:200]}"


def _bad_lines(file: Path, find: Callable[[bytes], str]) -> Iterator[str]:
    with open_file(file) as stream:
        number = 0
        while line := stream.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                yield _too_long(file, number)
                return
            if reason := find(line):
                yield f"{file}: line {number:,} {reason}"


def _bad_text(line: bytes) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte 0x{line[error.start]:02x}): save the file as UTF-8"
    return ""


def _bad_json(line: bytes) -> str:
    if reason := _bad_text(line):
        return reason
    if not line.strip():
        return ""
    try:
        value = json.loads(line)
    except ValueError as error:
        return f"is no JSON: {error}"
    except RecursionError:
        return "is nested too deeply"
    return "" if isinstance(value, dict) else 'is no object such as {"image": "1.jpg", "label": 3}'
