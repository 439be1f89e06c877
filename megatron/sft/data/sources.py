"""Reads the rows of data files: JSON lines, JSON arrays, CSV or parquet, plain or compressed, alone or in folders.

What a file is shows from its first bytes (CSV from its name). Memory is bounded by the longest row, never by the file, and
every row keeps the file and the line that it starts on, for messages.
"""

import csv
import gzip
import io
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron.sft.chat.fields import json_type
from megatron.sft.data import json_records
from megatron.sft.data.json_records import BYTE_ORDER_MARK, WHITESPACE, array_elements, decoded_row, lines
from megatron.sft.runtime.errors import UserError

__all__ = ["SourceRecord", "count_records", "data_files", "file_format", "json_type", "read_records"]

GZIP, ZSTANDARD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive: unpack it first (unzip)",
    b"BZh": "bzip2-compressed: unpack it first (bunzip2)",
    b"\xfd7zXZ": "xz-compressed: unpack it first (unxz)",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}
DATA_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
COMPRESSED_ENDINGS = (".gz", ".zst")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
PARQUET_ROWS_AT_ONCE = 128
LONE_SURROGATE = re.compile("[\\ud800-\\udfff]")
ZSTANDARD_BYTES = 1 << 14
# Beside data, but none: what step 3 itself writes, and what the `datasets` library puts into its folders.
NO_DATA = (
    "Tokenized-*_text_document.json",
    "*.rejected.jsonl",
    "dataset_info.json",
    "dataset_infos.json",
    "state.json",
)


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One row, decoded when asked for. `line` counts from 1; `end` is the byte offset just after it, for progress."""

    line: int
    content: "bytes | dict[str, Any] | UserError"
    end: int
    path: Path
    unit: str = "line"

    @property
    def place(self) -> str:
        return f"{self.path}, {self.unit} {self.line}"

    @property
    def fields(self) -> dict[str, Any]:
        """The row's fields. A row that cannot be read is a `UserError` with its file and line."""
        if isinstance(self.content, bytes):
            return decoded_row(self.content, self.place)
        if isinstance(self.content, UserError):
            raise UserError(f"{self.place}: {self.content}")
        return self.content


def data_files(path: Path) -> list[Path]:
    """The file itself, or the data files below a folder, sorted. Hidden files and what is no data are left out."""
    if not path.is_dir():
        return [path]
    found = []
    for file in sorted(path.rglob("*")):
        name = file.name.removesuffix(".gz").removesuffix(".zst")
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not hidden and name.endswith(DATA_ENDINGS) and not any(map(file.match, NO_DATA)):
            found.append(file)
    if not found:
        raise UserError(f"folder {path} has no data file ({', '.join(DATA_ENDINGS)}, or those with .gz or .zst)")
    return found


def file_format(path: Path) -> str:
    """`json array`, `json lines`, `csv` or `parquet`. Refuses missing and empty files and other formats."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
        if not start:
            raise UserError(f"data file {path} is empty: it needs at least one row")
        if start.startswith(PARQUET):
            return "parquet"
        with opened(path) as (content, _):
            return text_format(path, content)
    except FileNotFoundError:
        raise UserError(
            f"data file {path} does not exist: check the path, or get it with scripts/1_download.sh"
        ) from None
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror or error}") from None


def text_format(path: Path, content: BinaryIO) -> str:
    """What the text of a file is, by its name and its first character."""
    start = b""
    while piece := content.read(json_records.PIECE_BYTES if not start else 1 << 20):
        start += piece
        if start.removeprefix(BYTE_ORDER_MARK).lstrip(WHITESPACE):
            break
    for magic, what in OTHER_FORMATS.items():
        if start.startswith(magic):
            raise UserError(f"data file {path} is {what}")
    first = start.removeprefix(BYTE_ORDER_MARK).lstrip(WHITESPACE)[:1]
    if not first:
        raise UserError(f"data file {path} is empty: it needs at least one row")
    if separator_of(path):
        return "csv"
    return "json array" if first == b"[" else "json lines"


def read_records(path: Path) -> Iterator[SourceRecord]:
    """The rows of a file, or of all data files of a folder, in order."""
    for file in data_files(path):
        kind = file_format(file)
        if kind == "parquet":
            yield from _parquet_rows(file)
        elif kind == "csv":
            yield from _csv_rows(file)
        else:
            elements = array_elements if kind == "json array" else lines
            with opened(file) as (content, raw):
                is_compressed = content is not raw
                for line, row, end in elements(content, file):
                    yield SourceRecord(line, row, raw.tell() if is_compressed else end, file)


def count_records(path: Path) -> int:
    """How many rows `read_records` gives; nothing is decoded."""
    num_rows = 0
    for file in data_files(path):
        if file_format(file) == "parquet":
            with _parquet_errors(file):
                import pyarrow.parquet

                num_rows += int(pyarrow.parquet.ParquetFile(file).metadata.num_rows)
        else:
            num_rows += sum(1 for _ in read_records(file))
    return num_rows


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The unpacked content of a file, and the file itself, whose position says how much has been read."""
    with open(path, "rb") as raw:
        start = raw.read(4)
        raw.seek(0)
        try:
            if start.startswith(GZIP):
                yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)), raw
            elif start.startswith(ZSTANDARD):
                yield cast(BinaryIO, io.BufferedReader(_ZstandardStream(raw), json_records.PIECE_BYTES)), raw
            else:
                yield raw, raw
        except EOFError:
            raise UserError(f"data file {path} ends too early, it is cut short: get it again") from None
        except (zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"data file {path} is damaged ({error}): get it again") from None


class _ZstandardStream(io.RawIOBase):
    """The unpacked content of a .zst file of one or more frames. One that ends within a frame is an EOFError."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self.raw = raw
        self.library = zstandard
        self.frame = self._new_frame()
        self.left = b""  # unpacked and not read
        self.is_started = False

    def _new_frame(self) -> Any:
        return self.library.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.left:
            packed = self.frame.unused_data or self.raw.read(ZSTANDARD_BYTES)
            if not packed and (self.frame.eof or not self.is_started):
                return 0
            if not packed:
                raise EOFError
            if self.frame.eof:
                self.frame = self._new_frame()
            self.is_started = True
            try:
                self.left = self.frame.decompress(packed)
            except self.library.ZstdError as error:
                raise zlib.error(str(error)) from None
        size = min(len(buffer), len(self.left))
        buffer[:size], self.left = self.left[:size], self.left[size:]
        return size


def separator_of(path: Path) -> str | None:
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    return next((separator for ending, separator in SEPARATORS.items() if name.endswith(ending)), None)


def _csv_rows(path: Path) -> Iterator[SourceRecord]:
    """Rows of a file with a header line; every value stays text."""
    csv.field_size_limit(sys.maxsize)
    with opened(path) as (content, raw):
        # A byte that is no UTF-8 becomes a lone surrogate, which no UTF-8 text has: only its own row is refused.
        text = io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=separator_of(path) or ",", strict=True)
        names = _csv_names(path, reader)
        line = reader.line_num + 1
        try:
            for values in reader:
                if values:
                    yield SourceRecord(line, _csv_fields(names, values), raw.tell(), path)
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}, line {line}: not valid CSV ({error}): correct its quotes") from None
        finally:
            text.detach()


def _csv_names(path: Path, reader: Any) -> list[str]:
    try:
        names: list[str] = next(reader)
    except (csv.Error, StopIteration) as error:
        raise UserError(f"{path}, line 1: no header line ({error})") from None
    if len(set(names)) != len(names):
        raise UserError(f"{path}, line 1: a column is named twice in the header ({', '.join(names)}): rename one")
    return names


def _csv_fields(names: list[str], values: list[str]) -> "dict[str, Any] | UserError":
    """The row's fields, or what is wrong with it."""
    if len(values) != len(names):
        return UserError(f"the row has {len(values)} values, the header {len(names)}: correct its separators or quotes")
    for name, value in zip(names, values, strict=True):
        if not value.isascii() and LONE_SURROGATE.search(value):
            return UserError(f"field {name!r} is not UTF-8: save the file as UTF-8")
    return dict(zip(names, values, strict=True))


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"data file {path} is no readable parquet file ({reason}): get it again") from None


def _parquet_rows(path: Path) -> Iterator[SourceRecord]:
    """Rows are numbered from 1, as a parquet file has no lines. Fields that are null are left out."""
    import pyarrow.parquet

    with _parquet_errors(path):
        file = pyarrow.parquet.ParquetFile(path)
        total, size = max(file.metadata.num_rows, 1), path.stat().st_size
        number = 0
        for batch in file.iter_batches(PARQUET_ROWS_AT_ONCE):
            for row in batch.to_pylist():
                number += 1
                yield SourceRecord(number, without_nulls(row), size * number // total, path, "row")


def without_nulls(value: Any) -> Any:
    """A table's cell holds every field that the same cell of any other row has, as null: those are not there."""
    if isinstance(value, dict):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return value
