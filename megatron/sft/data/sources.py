"""Reads the records of data files: JSON lines, JSON arrays, CSV or parquet, plain or compressed, alone or in folders.

The first bytes of a file show its format (CSV shows from the name). Memory is bounded by the longest record, never by the file,
and every record keeps its file and line for messages.
"""

import csv
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from megatron.sft.data import json_records
from megatron.sft.data.compressed import opened
from megatron.sft.data.json_records import (
    BYTE_ORDER_MARK,
    WHITESPACE,
    array_elements,
    decoded_record,
    field_elements,
    lines,
    object_values,
    text_of,
    wrapping_field,
)
from megatron.sft.runtime.errors import UserError

PARQUET = b"PAR1"
ZIP = b"PK\x03\x04"
SPREADSHEETS = (".xlsx", ".xlsm", ".xlsb", ".ods")
OTHER_FORMATS = {
    ZIP: "a zip archive: unpack it first (unzip)",
    b"BZh": "bzip2-compressed: unpack it first (bunzip2)",
    b"\xfd7zXZ": "xz-compressed: unpack it first (unxz)",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}
DATA_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
OTHER_SEPARATORS = (";", "\t", "|", ",")  # that spreadsheets and databases write
PARQUET_BATCH = 128  # records that are in memory at a time
LONE_SURROGATE = re.compile("[\\ud800-\\udfff]")
# JSON files in data folders that are not data: what step 3 itself writes, and what the `datasets` library adds.
NOT_DATA = ("Tokenized-*_text_document.json", "*.rejected.jsonl", "dataset_info.json", "dataset_infos.json", "state.json")


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One record, decoded when asked for.

    content: JSON text, the fields of a table's line, or what is wrong with this record.
    number: its line, or where there are no lines (parquet, the hub) its place among the records; both from 1.
    end: how far the file is read, in bytes, for progress.
    """

    number: int
    content: "bytes | dict[str, Any] | UserError"
    end: int
    path: Path
    unit: str = "line"  # or "record": what `number` counts

    @property
    def place(self) -> str:
        return f"{self.path}, {self.unit} {self.number}"

    @property
    def fields(self) -> dict[str, Any]:
        """The record's fields. One that cannot be read is a `UserError` with its file and line."""
        if isinstance(self.content, bytes):
            return decoded_record(self.content, self.place)
        if isinstance(self.content, UserError):
            raise UserError(f"{self.place}: {self.content}")
        return self.content


def uncompressed(name: str) -> str:
    """A file's name without .gz or .zst."""
    return name.removesuffix(".gz").removesuffix(".zst")


def has_data_name(path: Path) -> bool:
    return uncompressed(path.name).endswith(DATA_ENDINGS)


def data_files(path: Path) -> list[Path]:
    """The file itself, or the data files below a folder, sorted; hidden ones are skipped."""
    if not path.is_dir():
        return [path]
    found = []
    for file in sorted(path.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not is_hidden and has_data_name(file) and not any(map(file.match, NOT_DATA)):
            found.append(file)
    if not found and any(path.rglob("*.arrow")):
        raise UserError(
            f"folder {path} is of datasets' save_to_disk, whose .arrow files are not read: write a split as JSON lines with "
            "load_from_disk(FOLDER).to_json(FILE)"
        )
    if not found:
        endings = f"{', '.join(DATA_ENDINGS)}, or those with .gz or .zst"
        raise UserError(f"folder {path} has no data file ({endings}): give the file itself, whatever its name, or rename it")
    return found


def file_format(path: Path) -> str:
    """`json array`, `json lines`, `json object` (of one record, over several lines), `json object of NAME` (a field with the
    records), `csv` or `parquet`. Another format, or a missing, empty or damaged file is a `UserError`."""
    try:
        with opened(path) as (content, _):
            start = content.read(json_records.PIECE_SIZE)
            first = start.removeprefix(BYTE_ORDER_MARK).lstrip(WHITESPACE)[:1]
            while not first and (piece := content.read(1 << 20)):
                first = piece.lstrip(WHITESPACE)[:1]
    except FileNotFoundError:
        raise UserError(f"data file {path} does not exist: check the path, or get it with scripts/1_download.sh") from None
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror or error}") from None
    if start.startswith(ZIP) and path.suffix.lower() in SPREADSHEETS:
        raise UserError(f"data file {path} is a spreadsheet: save it as CSV (UTF-8), or export it as JSON lines")
    for magic, what in OTHER_FORMATS.items():
        if start.startswith(magic):
            raise UserError(f"data file {path} is {what}")
    if not first:
        raise UserError(f"data file {path} is empty: it needs at least one record")
    if start.startswith(PARQUET):
        return "parquet"
    if _separator(path):
        return "csv"
    return _json_format(path, "json array" if first == b"[" else "json object")


def _json_format(path: Path, whole: str) -> str:
    """The format of a file that begins as a JSON value of the form `whole` does: that, if the value is the whole file."""
    with opened(path) as (content, _):
        lines_of_file = lines(content, path)
        first, second = next(lines_of_file)[1], next(lines_of_file, None)
    is_whole_line = json_records.is_json(first)
    if whole == "json array":
        return "json lines" if is_whole_line and second and second[1].lstrip(WHITESPACE).startswith(b"[") else whole
    if is_whole_line and second:
        return "json lines"
    try:
        with opened(path) as (content, _):
            name = wrapping_field(content, path)
    except UserError:
        if first.strip() == b"{" and second and second[1].lstrip().startswith(b'"'):
            raise
        return "json lines"  # whose reader says which line is wrong
    if name:
        return f"{whole} of {name}"
    return "json lines" if is_whole_line else whole


def read_records(path: Path) -> Iterator[SourceRecord]:
    """The records of a file, or of all data files of a folder, in order."""
    readers = {"json array": array_elements, "json object": object_values, "json lines": lines, "csv": _csv_records}
    for file in data_files(path):
        kind = file_format(file)
        if kind == "parquet":
            yield from _parquet_records(file)
            continue
        with opened(file) as (content, raw):
            form, _, name = kind.partition(" of ")
            reader = partial(field_elements, name) if name else readers[form]
            for line, record in reader(content, file):
                yield SourceRecord(line, record, raw.tell(), file)


def count_records(path: Path) -> int:
    """How many records `read_records` gives, without decoding them."""
    num_records = 0
    for file in data_files(path):
        if file_format(file) == "parquet":
            with _parquet_file(file) as table:
                num_records += int(table.metadata.num_rows)
        else:
            num_records += sum(1 for _ in read_records(file))
    return num_records


def _separator(path: Path) -> str | None:
    """Of a table's columns, by the file's name; None for a file that is not a table."""
    return SEPARATORS.get(Path(uncompressed(path.name)).suffix)


def _csv_records(file: BinaryIO, path: Path) -> Iterator[tuple[int, "dict[str, Any] | UserError"]]:
    """(line it starts on, fields) of the records below a header line. Every value stays text: "NA" is not null."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(text_of(file), delimiter=_separator(path) or ",", strict=True)
    names = _csv_header(path, reader)
    line = reader.line_num + 1
    try:
        for values in reader:
            if values:
                yield line, _csv_fields(names, values)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: not valid CSV ({error}): correct its quotes") from None


def _csv_header(path: Path, reader: Any) -> list[str]:
    try:
        names: list[str] = next(reader)
    except (csv.Error, StopIteration) as error:
        raise UserError(f"{path}, line 1: no header line ({error})") from None
    other = next((mark for mark in OTHER_SEPARATORS if mark in names[0]), None) if len(names) == 1 else None
    if other:
        raise UserError(
            f"{path}, line 1: the header {names[0]!r} has no {_separator(path)!r} but {other!r}: save the table with commas, "
            "or as .tsv with tabs"
        )
    if len(set(names)) != len(names):
        raise UserError(f"{path}, line 1: the header names a column twice ({', '.join(names)}): rename one")
    return names


def _csv_fields(names: list[str], values: list[str]) -> "dict[str, Any] | UserError":
    if len(values) != len(names):
        return UserError(f"the record has {len(values)} values, the header {len(names)}: correct its separators or quotes")
    for name, value in zip(names, values, strict=True):
        if not value.isascii() and LONE_SURROGATE.search(value):
            return UserError(f"field {name!r} is not UTF-8: save the file as UTF-8")
    return dict(zip(names, values, strict=True))


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    try:
        yield pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"data file {path} is not a readable parquet file ({reason}): get it again") from None


def _parquet_records(path: Path) -> Iterator[SourceRecord]:
    with _parquet_file(path) as table:
        num_records, num_bytes = max(table.metadata.num_rows, 1), path.stat().st_size
        number = 0
        for batch in table.iter_batches(PARQUET_BATCH):
            for cells in batch.to_pylist():
                number += 1
                yield SourceRecord(number, table_fields(cells), num_bytes * number // num_records, path, "record")


def table_fields(cells: dict[str, Any]) -> dict[str, Any]:
    """The fields of a typed table's line (Arrow). A column without a value is null, as in a JSON file that names it; within a
    cell null stands for "not there", since every object has the fields of all other objects in its column."""
    return {name: _without_nulls(value) for name, value in cells.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        if value and isinstance(value[0], tuple):  # a map
            return {name: _without_nulls(item) for name, item in value}
        return [_without_nulls(item) for item in value]
    if isinstance(value, Decimal) and value == value.to_integral_value():
        return int(value)  # how tables keep whole numbers above 64 bits
    return value
