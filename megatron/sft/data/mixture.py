"""The inputs of a run: files, folders or hub ids, each whole or a sampled number or share of its records.

`a.jsonl#500` is 500 records, `a.jsonl#20%` a fifth of its records. Records are sampled without replacement; where more are
wanted than there are, all are taken as often as they fit in whole, and the rest is sampled.
"""

import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron.sft.data import sources
from megatron.sft.data.sources import DATA_ENDINGS, SourceRecord, data_files, uncompressed
from megatron.sft.hf.names import ASSETS
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import sha256_of_file, sha256_of_text

WITH_AMOUNT = re.compile(r"(.+)#([^#\s]+)", re.DOTALL)
AMOUNT = re.compile(r"[1-9][0-9]*|[0-9]+(?:\.[0-9]+)?%")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?::[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class Input:
    """One input as the user names it. `amount` is a count or a share (`20%`) of its records, empty for all of them."""

    name: str
    amount: str = ""

    @property
    def path(self) -> Path:
        return Path(self.name)

    @property
    def is_on_hub(self) -> bool:
        return not self.path.exists() and HUB_ID.fullmatch(self.name) is not None and not self.name.endswith(DATA_ENDINGS)

    @property
    def short_name(self) -> str:
        """For the name of the result."""
        if self.is_on_hub:
            return re.sub("[/:]", "-", self.name)
        path = Path(os.path.abspath(self.path))
        return path.name if path.is_dir() else Path(uncompressed(path.name)).stem

    @property
    def folder(self) -> Path:
        """Where the result goes: next to the data."""
        if self.is_on_hub:
            return _assets() / "data" / self.short_name
        return self.path if self.path.is_dir() else self.path.parent


@dataclass(frozen=True)
class Source:
    """A validated input: its content's hash, its format, and how many records it has and how many are wanted.

    wanted: None for all of them, which are not counted beforehand: `num_records` is None then, too.
    """

    input: Input
    sha256: str
    file_format: str
    num_bytes: int
    num_records: int | None = None
    wanted: int | None = None

    def records(self, seed: int, index: int) -> Iterator[SourceRecord]:
        """The wanted records in the order of the files; one that is taken several times is repeated immediately.

        index: the source's place among all, so that one that is named twice is sampled differently.
        """
        records = _all_records(self.input)
        if self.wanted is None or self.num_records is None:
            yield from records
            return
        passes, sampled = divmod(self.wanted, self.num_records)
        draw = random.Random(f"{seed} {index}")
        # Selection sampling: the chance of a record is what is still wanted divided by what is still to come.
        for to_come, record in zip(range(self.num_records, 0, -1), records, strict=True):
            taken = draw.random() * to_come < sampled
            sampled -= taken
            for _ in range(passes + taken):
                yield record


def parse_inputs(texts: list[str]) -> list[Input]:
    """The inputs that one or several texts name; a `UserError` for one that does not exist or names no amount.

    A text that is an existing path is one input. Otherwise its lines are inputs or, if it is one line, its words, so that only
    paths with spaces among several inputs need lines to themselves.
    """
    inputs = []
    for text in texts:
        found = WITH_AMOUNT.fullmatch(text)
        if Path(text).exists() or (found and Path(found.group(1)).exists()):
            pieces = [text]
        else:
            pieces = [line.strip() for line in text.splitlines()] if "\n" in text.strip() else text.split()
        inputs += [_parsed_input(piece, len(pieces) > 1) for piece in pieces if piece]
    if not inputs:
        raise UserError("no data is named: give a file, a folder or a hub id")
    return inputs


def _parsed_input(text: str, is_one_of_several: bool) -> Input:
    found = None if Path(text).exists() else WITH_AMOUNT.fullmatch(text)
    if not found:
        parsed = Input(text)
    elif AMOUNT.fullmatch(found.group(2)) and Decimal(found.group(2).rstrip("%")) > 0:
        parsed = Input(found.group(1), found.group(2))
    else:
        raise UserError(f"input {text!r}: {found.group(2)!r} is not a number of records: give #500, or #20% of its records")
    if not parsed.path.exists() and not parsed.is_on_hub:
        hint = " (paths with spaces, among several inputs: one on each line)" if is_one_of_several else ""
        raise UserError(f"data file {parsed.name} does not exist: check the path, or get it with scripts/1_download.sh{hint}")
    return parsed


def validated_source(input: Input) -> Source:
    """Look at an input: hash its content, and count its records if only some are wanted.

    A `UserError` where it cannot be read, has a format that is not supported, or too few records for its amount.
    """
    if input.is_on_hub:
        commit = _hub_commit(input)
        total = sum(1 for _ in _all_records(input))
        digest = sha256_of_text(f"{input.name} {commit}")
        return Source(input, digest, f"hub, {commit[:12]}", total, total, _wanted(input, total))
    files = data_files(input.path)
    formats = sorted({sources.file_format(file) for file in files})
    hashes = [sha256_of_file(file) for file in files]
    names = [str(file.relative_to(input.path)) for file in files] if input.path.is_dir() else []
    digest = sha256_of_text(repr((names, hashes))) if names else hashes[0]
    num_bytes = sum(file.stat().st_size for file in files)
    num_records = sources.count_records(input.path) if input.amount else None
    wanted = _wanted(input, num_records) if num_records is not None else None
    return Source(input, digest, " and ".join(formats), num_bytes, num_records, wanted)


def _wanted(input: Input, num_records: int) -> int | None:
    """How many records are wanted, None for all."""
    if not input.amount:
        return None
    if not num_records:
        raise UserError(f"input {input.name} has no records to take {input.amount} of")
    if not input.amount.endswith("%"):
        return int(input.amount)
    share = int((Decimal(input.amount[:-1]) * num_records / 100).to_integral_value("ROUND_HALF_UP"))
    if not share:
        raise UserError(f"input {input.name}: {input.amount} of {num_records} records is less than one: take more")
    return share


def _all_records(input: Input) -> Iterator[SourceRecord]:
    if not input.is_on_hub:
        num_bytes = 0
        for file in data_files(input.path):
            for record in sources.read_records(file):
                yield record if not num_bytes else replace(record, end=num_bytes + record.end)
            num_bytes += file.stat().st_size
        return
    # Imported here: the hub's client takes a second.
    from megatron.sft.data import hub_records

    id, _, config = input.name.partition(":")
    selection = hub_records.Selection(config=config or None)
    for number, record in enumerate(hub_records.open_records(id, selection, "main", _assets() / "cache"), start=1):
        yield SourceRecord(number, record.content, number, input.path, "record")


def _hub_commit(input: Input) -> str:
    from megatron.sft.hf import hub

    try:
        return hub.find_repository("dataset", input.name.partition(":")[0], "main").commit
    except UserError as error:
        raise UserError(f"{input.name} is not a file or folder here, and as a hub id: {error}") from None


def _assets() -> Path:
    return Path(os.environ.get("ASSETS_DIR") or ASSETS)


def source_names(manifest: dict[str, Any]) -> list[str]:
    """Short names of a manifest's inputs, in its order, which distinguish a run's losses: of the file, folder or hub id, and
    numbered where several have the same."""
    names = [_name_without_ending(source["path"]) for source in manifest.get("sources", [])]
    counts, seen = Counter(names), Counter[str]()
    result = []
    for name in names:
        seen[name] += 1
        result.append(f"{name} ({seen[name]})" if counts[name] > 1 else name)
    return result


def _name_without_ending(path: str) -> str:
    """Other endings stay, since the name of a folder or hub id may have dots."""
    name = uncompressed(Path(path).name)
    return Path(name).stem if name.endswith(DATA_ENDINGS) else name
