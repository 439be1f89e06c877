"""The inputs of a run: files, folders or hub ids, each whole or a sampled number or share of its rows.

`a.jsonl#500` is 500 rows, `a.jsonl#20%` a fifth of its own rows. Rows are taken without replacement; when more are wanted
than there are, all are taken as often as they go in, and the rest is sampled.
"""

import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron.sft.data.sources import DATA_ENDINGS, SourceRecord, count_records, data_files, file_format, read_records
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import sha256_of_file, sha256_of_text

WITH_AMOUNT = re.compile(r"(.+)#([^#\s]+)", re.DOTALL)
AMOUNT = re.compile(r"[1-9][0-9]*|[0-9]+(?:\.[0-9]+)?%")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?::[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class Input:
    """One input as the user names it. `amount` is a count or a share (`20%`) of its rows, empty for all of them."""

    name: str
    amount: str = ""

    @property
    def path(self) -> Path:
        return Path(self.name)

    @property
    def is_on_hub(self) -> bool:
        return (
            not self.path.exists() and HUB_ID.fullmatch(self.name) is not None and not self.name.endswith(DATA_ENDINGS)
        )

    @property
    def short_name(self) -> str:
        """For the name of the result."""
        if self.is_on_hub:
            return re.sub("[/:]", "-", self.name)
        path = Path(os.path.abspath(self.path))
        return path.name if path.is_dir() else Path(path.name.removesuffix(".gz").removesuffix(".zst")).stem

    @property
    def folder(self) -> Path:
        """Where the result goes: beside the data."""
        if self.is_on_hub:
            return assets_folder() / "data" / self.short_name
        return self.path if self.path.is_dir() else self.path.parent


@dataclass(frozen=True)
class Source:
    """An input that has been looked at: its content's hash, its format, how many rows it has and how many are wanted
    (None: all of them, not counted beforehand)."""

    input: Input
    sha256: str
    file_format: str
    num_bytes: int
    num_rows: int | None = None
    wanted: int | None = None

    def rows(self, seed: int, number: int) -> Iterator[SourceRecord]:
        """The wanted rows in the order of the files; a row that is wanted several times comes so often in a row.
        `number` is the source's place among all, so that one that is named twice is sampled anew."""
        rows = all_rows(self.input)
        if self.wanted is None or self.num_rows is None:
            yield from rows
            return
        passes, left = divmod(self.wanted, self.num_rows)
        draw = random.Random(f"{seed} {number}")
        # Selection sampling: a row is taken with the chance of what is still wanted in what is still to come.
        for to_come, row in zip(range(self.num_rows, 0, -1), rows, strict=True):
            taken = draw.random() * to_come < left
            left -= taken
            for _ in range(passes + taken):
                yield row


def assets_folder() -> Path:
    return Path(os.environ.get("ASSETS_DIR") or Path(__file__).parents[3] / "assets")


def parse_inputs(texts: list[str]) -> list[Input]:
    """The inputs that one or several texts name. A text that is the path of something is one input. Else its lines are,
    or, if it is one line, its words, so that only paths with spaces among several inputs need lines of their own."""
    inputs = []
    for text in texts:
        if exists(text):
            pieces = [text]
        else:
            pieces = [line.strip() for line in text.splitlines()] if "\n" in text.strip() else text.split()
        several = len(pieces) > 1
        inputs += [parsed_input(piece, several) for piece in pieces if piece]
    if not inputs:
        raise UserError("no data is named: give a file, a folder or a hub id")
    return inputs


def exists(text: str) -> bool:
    found = WITH_AMOUNT.fullmatch(text)
    return Path(text).exists() or bool(found and Path(found.group(1)).exists())


def parsed_input(text: str, several: bool) -> Input:
    found = None if Path(text).exists() else WITH_AMOUNT.fullmatch(text)
    if not found:
        given = Input(text)
    elif AMOUNT.fullmatch(found.group(2)) and Decimal(found.group(2).rstrip("%")) > 0:
        given = Input(found.group(1), found.group(2))
    else:
        raise UserError(f"input {text!r}: {found.group(2)!r} is no number of rows: give #500, or #20% of its rows")
    if not given.path.exists() and not given.is_on_hub:
        hint = " (paths with spaces, among several inputs: one on each line)" if several else ""
        raise UserError(
            f"data file {given.name} does not exist: check the path, or get it with scripts/1_download.sh{hint}"
        )
    return given


def validated_source(given: Input) -> Source:
    """Look at an input: refuse what cannot be read, hash its content, count its rows if only some are wanted."""
    if given.is_on_hub:
        commit = hub_commit(given)
        total = sum(1 for _ in all_rows(given))
        digest = sha256_of_text(f"{given.name} {commit}")
        return Source(given, digest, f"hub, {commit[:12]}", total, total, wanted_of(given, total))
    files = data_files(given.path)
    formats = sorted({file_format(file) for file in files})
    hashes = [sha256_of_file(file) for file in files]
    names = [str(file.relative_to(given.path)) for file in files] if given.path.is_dir() else []
    digest = sha256_of_text(repr((names, hashes))) if names else hashes[0]
    num_bytes = sum(file.stat().st_size for file in files)
    num_rows = count_records(given.path) if given.amount else None
    wanted = wanted_of(given, num_rows) if num_rows is not None else None
    return Source(given, digest, " and ".join(formats), num_bytes, num_rows, wanted)


def wanted_of(given: Input, num_rows: int) -> int | None:
    """How many rows are wanted, None for all."""
    if not given.amount:
        return None
    if not num_rows:
        raise UserError(f"input {given.name} has no rows to take {given.amount} of")
    if not given.amount.endswith("%"):
        return int(given.amount)
    share = int((Decimal(given.amount[:-1]) * num_rows / 100).to_integral_value("ROUND_HALF_UP"))
    if not share:
        raise UserError(f"input {given.name}: {given.amount} of {num_rows} rows is not one row: take more")
    return share


def all_rows(given: Input) -> Iterator[SourceRecord]:
    if not given.is_on_hub:
        files = data_files(given.path)
        before = 0
        for file in files:
            for row in read_records(file):
                yield row if not before else SourceRecord(row.line, row.content, before + row.end, row.path, row.unit)
            before += file.stat().st_size
        return
    from megatron.sft.data import hub_records

    id, _, config = given.name.partition(":")
    cache = assets_folder() / "cache"
    for number, fields in enumerate(
        hub_records.open_rows(id, hub_records.Selection(config=config or None), "main", cache), start=1
    ):
        yield SourceRecord(number, fields, number, Path(given.name), "row")


def hub_commit(given: Input) -> str:
    from megatron.sft.hf import hub

    try:
        return str(hub.find_repository("dataset", given.name.partition(":")[0], "main").commit)
    except UserError as error:
        raise UserError(f"{given.name} is no file or folder here, and as a hub id: {error}") from None


def source_names(manifest: dict[str, Any]) -> list[str]:
    """The name of each input in the manifest's order: of its file or folder, numbered where several have the same."""
    names = [_short(Path(source["path"])) for source in manifest.get("sources", [])]
    counts, seen = Counter(names), Counter[str]()
    result = []
    for name in names:
        seen[name] += 1
        result.append(f"{name} ({seen[name]})" if counts[name] > 1 else name)
    return result


def _short(path: Path) -> str:
    name = path.name
    while name.endswith((*DATA_ENDINGS, ".gz", ".zst")) and Path(name).stem:
        name = Path(name).stem
    return name
