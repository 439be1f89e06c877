"""The records of a data set, wherever it is (a file, a folder, a repository on the hub), and their copy as JSON lines.

`datasets` says which files make up a configuration and a split. JSON, CSV and parquet are then read by sources.py, as the same
file given to step 3 is: `datasets` would fill every key that some other record has with null, and turn the text "NA" into null.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.sft.data.sources import SourceRecord, has_data_name, read_records, table_fields
from megatron.sft.hf import hub
from megatron.sft.runtime import exact_json
from megatron.sft.runtime.errors import UserError

PROGRESS_RECORDS = 200_000


@dataclass(frozen=True)
class Selection:
    """Which records of a data set, and the new names of columns."""

    split: str = "train"
    config: str | None = None
    renamed: dict[str, str] = field(default_factory=dict)


def open_records(source: Path | str, selection: Selection, revision: str, cache: Path) -> Iterator[SourceRecord]:
    """The records of a file, a folder or a hub id. Files from the hub are kept below `cache`."""
    if isinstance(source, str):
        return _repository_records(source, selection, revision, cache)
    if source.is_file():
        return read_records(source)
    builder = _builder(str(source), selection, None, cache)
    return _builder_records(builder, selection.split, [Path(file) for file in _split_files(builder, selection)])


def _repository_records(id: str, selection: Selection, revision: str, cache: Path) -> Iterator[SourceRecord]:
    repository = hub.find_repository("dataset", id, revision)
    with hub.explained("dataset", id, revision):
        builder = _builder(id, selection, repository.commit, cache)
        # They read hf://datasets/OWNER/NAME@COMMIT/path.
        names = [url.partition(f"@{repository.commit}/")[2] for url in _split_files(builder, selection)]
    folder = cache / f"{id.replace('/', '-')}-{repository.commit[:12]}"
    num_bytes = sum(repository.files[name] for name in names)
    print(f"downloading {id} at {repository.commit[:12]}: {len(names)} files, {num_bytes / 1e6:,.1f} MB", flush=True)
    hub.fetch_files(repository, names, folder)
    return _builder_records(builder, selection.split, [folder / name for name in names])


def _builder(location: str, selection: Selection, revision: str | None, cache: Path) -> Any:
    """The `datasets` builder of a folder or id, which knows the files of every split."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset_builder(location, selection.config, revision=revision, cache_dir=str(cache / "datasets"))
    except datasets.exceptions.DataFilesNotFoundError:
        raise UserError(f"dataset {location} has no data files (json, parquet, csv): choose another one") from None
    except (ValueError, RuntimeError) as error:
        # An unknown configuration, several of which none was chosen, or a data set that is a program.
        reason = " ".join(str(error).split()).partition(" Example of usage")[0]
        raise UserError(f"dataset {location}, CONFIG={selection.config or ''}: {reason}: set CONFIG (--config)") from None


def _split_files(builder: Any, selection: Selection) -> list[str]:
    splits = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    if selection.split not in splits:
        raise UserError(
            f"split {selection.split} is not in the data set, which has {', '.join(splits) or 'none'}: set SPLIT (--split)"
        )
    return splits[selection.split]


def _builder_records(builder: Any, split: str, files: list[Path]) -> Iterator[SourceRecord]:
    """Known formats are read directly, whatever else `datasets` can read (arrow, text) through it."""
    import datasets

    if all(map(has_data_name, files)) and not getattr(builder.config, "field", None):
        for file in files:
            yield from read_records(file)
        return
    builder.config.data_files = datasets.data_files.DataFilesDict({split: [str(file) for file in files]})
    for number, cells in enumerate(builder.as_streaming_dataset(split=split), start=1):
        yield SourceRecord(number, table_fields(cells), number, files[0].parent, "record")


def write_records(records: Iterator[SourceRecord], renamed: dict[str, str], target: Path) -> tuple[int, list[str]]:
    """Write JSON lines to `target`, which appears only when it is complete.

    Returns the number of records, and the columns in order of appearance. A `UserError` for a record that cannot be read, lacks
    a column to rename or cannot be written as JSON, for an empty data set, and for a full disk.
    """
    staged = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    columns: dict[str, None] = {}
    num_records = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(staged, "wb") as file:
            for num_records, record in enumerate(records, start=1):
                fields = _with_new_names(record.fields, renamed, num_records)
                columns.update(dict.fromkeys(fields))
                file.write(_json_line(fields, num_records))
                if num_records % PROGRESS_RECORDS == 0:
                    print(f"{num_records:,} records", flush=True)
        if not num_records:
            raise UserError(f"no records for {target}: the data set is empty")
        staged.replace(target)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"the disk of {target.parent} is full: make room or set ASSETS_DIR to another disk") from None
    finally:
        staged.unlink(missing_ok=True)
        with suppress(OSError):  # the folder is not empty, unless this failed
            target.parent.rmdir()
    return num_records, list(columns)


def _with_new_names(fields: dict[str, Any], renamed: dict[str, str], number: int) -> dict[str, Any]:
    for old, new in renamed.items():
        if old not in fields:
            raise UserError(f"record {number} has no column {old} to rename, it has {', '.join(fields)}: correct MAP_COLUMNS")
        if new in fields and new not in renamed:
            raise UserError(
                f"record {number} already has a column {new}: rename that one too, as {new}=other, or correct MAP_COLUMNS"
            )
    return {renamed.get(name, name): value for name, value in fields.items()}


def _json_line(fields: dict[str, Any], number: int) -> bytes:
    try:
        return exact_json.dumps(fields) + b"\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"record {number} cannot be written as JSON ({error}): choose a data set of text") from None
