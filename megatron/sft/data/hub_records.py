"""The rows of a data set, wherever it is: a file, a folder of files, or a repository on the hub; written as JSON lines.

`datasets` says which files make up a configuration and split. JSON, parquet and CSV are then read directly, so that a row
is written as it was: `datasets` would fill every key that some other row has with null, and turn the text "NA" into null.
"""

import csv
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet

from megatron.sft.data.sources import read_records
from megatron.sft.hf import hub
from megatron.sft.runtime.errors import UserError

Row = dict[str, Any]
ROWS_AT_ONCE = 1000
PROGRESS_ROWS = 200_000
JSON_ENDINGS = (".json", ".jsonl", ".ndjson")
SEPARATORS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Selection:
    """Which rows of a data set, and the new names of columns."""

    split: str = "train"
    config: str | None = None
    renamed: dict[str, str] = field(default_factory=dict)


def open_rows(source: Path | str, selection: Selection, revision: str, cache: Path) -> Iterator[Row]:
    """The rows of a file, of a folder or of a hub id. Files from the hub are kept below `cache`."""
    if isinstance(source, str):
        return _rows_of_repository(source, selection, revision, cache)
    if source.is_file():
        return _rows_of_file(source)
    builder = _builder(str(source), selection, None, cache)
    return _rows_of_builder(builder, selection.split, [Path(file) for file in _files_of_split(builder, selection)])


def _rows_of_repository(id: str, selection: Selection, revision: str, cache: Path) -> Iterator[Row]:
    repository = hub.find_repository("dataset", id, revision)
    with hub.explained("dataset", id, revision):
        builder = _builder(id, selection, repository.commit, cache)
        # They read hf://datasets/OWNER/NAME@COMMIT/path.
        names = [url.partition(f"@{repository.commit}/")[2] for url in _files_of_split(builder, selection)]
    folder = cache / f"{id.replace('/', '-')}-{repository.commit[:12]}"
    num_bytes = sum(repository.files[name] for name in names)
    print(f"downloading {id} at {repository.commit[:12]}: {len(names)} files, {num_bytes / 1e6:,.1f} MB", flush=True)
    hub.fetch_files(repository, names, folder)
    return _rows_of_builder(builder, selection.split, [folder / name for name in names])


def _builder(location: str, selection: Selection, revision: str | None, cache: Path) -> Any:
    """What `datasets` makes of a folder or id: its configuration with the files of every split."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset_builder(
            location, selection.config, revision=revision, cache_dir=str(cache / "datasets")
        )
    except datasets.exceptions.DataFilesNotFoundError:
        raise UserError(f"dataset {location} has no data files (json, parquet, csv): choose another one") from None
    except (ValueError, RuntimeError) as error:
        # An unknown configuration, several and none chosen, or a data set that is a program.
        reason = " ".join(str(error).split()).partition(" Example of usage")[0]
        raise UserError(
            f"dataset {location}, CONFIG={selection.config or ''}: {reason}: set CONFIG (--config)"
        ) from None


def _files_of_split(builder: Any, selection: Selection) -> list[str]:
    splits = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    if selection.split not in splits:
        raise UserError(
            f"split {selection.split} is not in the data set, which has {', '.join(splits) or 'none'}: set SPLIT (--split)"
        )
    return splits[selection.split]


def _rows_of_builder(builder: Any, split: str, files: list[Path]) -> Iterator[Row]:
    """Known formats directly; whatever else `datasets` can read (arrow, text, compressed files), through it."""
    import datasets

    known = all(file.suffix in (*JSON_ENDINGS, ".parquet", *SEPARATORS) for file in files)
    if known and not getattr(builder.config, "field", None):
        for file in files:
            yield from _rows_of_file(file)
        return
    builder.config.data_files = datasets.data_files.DataFilesDict({split: [str(file) for file in files]})
    yield from builder.as_streaming_dataset(split=split)


def _rows_of_file(path: Path) -> Iterator[Row]:
    if path.suffix == ".parquet":
        return _rows_of_parquet(path)
    if path.suffix in SEPARATORS:
        return _rows_of_table(path, SEPARATORS[path.suffix])
    return (row.fields for row in read_records(path))


def _rows_of_parquet(path: Path) -> Iterator[Row]:
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(ROWS_AT_ONCE):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"data file {path} is no readable parquet file ({str(error).partition('.')[0]})") from None


def _rows_of_table(path: Path, separator: str) -> Iterator[Row]:
    """A file with a header line; every value stays text."""
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file, delimiter=separator), start=1):
            if None in row or None in row.values():
                raise UserError(f"data file {path}: row {number} has not as many values as the header: mend it")
            yield row


def write_rows(rows: Iterator[Row], renamed: dict[str, str], target: Path) -> tuple[int, list[str]]:
    """Write JSON lines to `target` in one stroke; returns the number of rows and the columns in order of appearance."""
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    columns: dict[str, None] = {}
    num_rows = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(beside, "wb") as file:
            for row in rows:
                num_rows += 1
                row = _with_new_names(row, renamed, num_rows)
                columns.update(dict.fromkeys(row))
                file.write(_json_line(row, num_rows))
                if num_rows % PROGRESS_ROWS == 0:
                    print(f"{num_rows:,} rows", flush=True)
        if not num_rows:
            raise UserError(f"no rows for {target}: the data set is empty")
        beside.replace(target)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"the disk of {target.parent} is full: make room or set ASSETS_DIR to another disk") from None
    finally:
        beside.unlink(missing_ok=True)
        with suppress(OSError):  # it is not empty, unless this failed
            target.parent.rmdir()
    return num_rows, list(columns)


def _with_new_names(row: Row, renamed: dict[str, str], number: int) -> Row:
    for old, new in renamed.items():
        if old not in row:
            raise UserError(f"row {number} has no column {old} to rename, it has {', '.join(row)}: mend MAP_COLUMNS")
        if new in row and new not in renamed:
            raise UserError(
                f"row {number} has a column {new} already: rename that one too, as {new}=other, or mend MAP_COLUMNS"
            )
    return {renamed.get(name, name): value for name, value in row.items()}


def _json_line(row: Row, number: int) -> bytes:
    try:
        return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
    except TypeError as error:
        raise UserError(f"row {number} cannot be written as JSON ({error}): choose a data set of text") from None
