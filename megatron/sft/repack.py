"""Packs tokenised data again, with another length, seed or packing, without tokenising. `tools/repack` runs

    python -m megatron.sft.repack PREFIX --seq-length 8192

Conversations, masks and groups come from the existing files; what tokenising dropped or cut does not come back.
"""

import argparse
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron.sft.chat.encoding import Conversation
from megatron.sft.data.counts import Counts, Unit, fitting, unit_length
from megatron.sft.data.packing import ALGORITHM
from megatron.sft.data.report import packed_units, print_dropped
from megatron.sft.data.store import ConversationStore
from megatron.sft.data.tokenized import Row, TokenizedRows, data_prefix, is_finished
from megatron.sft.runtime.errors import OneLineParser, UserError, run
from megatron.sft.runtime.manifest import sha256_of_text

OVERLONG = ("drop", "truncate", "error")


@dataclass(frozen=True)
class Options:
    """How the new rows are made."""

    seq_length: int
    seed: int
    packing: bool
    overlong: str


def main(argv: Sequence[str] | None = None) -> int:
    given = _parse(argv)
    # End as an error would, so that temporary files are removed.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    source = TokenizedRows(data_prefix(given.prefix))
    old = source.manifest
    options = Options(
        seq_length=given.seq_length or old["length"],
        seed=old.get("seed", 1234) if given.seed is None else given.seed,
        packing=not given.no_packing,
        overlong=given.overlong,
    )
    prefix = given.output_prefix or new_prefix(source, options.seq_length)
    files = (old["files"]["bin"]["sha256"], old["files"]["idx"])
    fingerprint = sha256_of_text(repr(("repack", ALGORITHM, *files, options)))
    if is_finished(prefix, fingerprint):
        print(f"already packed from the same files with the same options: {prefix}.bin, .idx, .json")
        return 0
    repack(source, options, prefix, fingerprint)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="repack", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prefix", type=Path, help="the files' common name; with or without .bin, .idx or .json")
    parser.add_argument("--seq-length", type=_at_least(1), help="tokens in a row; default: unchanged")
    parser.add_argument("--seed", type=_at_least(0), help="default: unchanged")
    parser.add_argument("--no-packing", action="store_true", help="one conversation a row")
    parser.add_argument("--overlong", choices=OVERLONG, default="drop", help="what to do with longer conversations")
    parser.add_argument("--output-prefix", type=Path, help="default: the same name with the new length")
    return parser.parse_args(argv)


def _at_least(least: int) -> Any:
    def number(text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text) < 1 << 62):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, at least {least}")
        return int(text)

    return number


def new_prefix(source: TokenizedRows, seq_length: int) -> Path:
    """The source's name with the new length in place of the old one, or at the end if the old one is not in it."""
    old, name = source.manifest["length"], source.prefix.name
    if seq_length == old:
        return source.prefix
    renamed, count = re.subn(rf"-{old}(?=_text_document$|$)", f"-{seq_length}", name)
    return source.prefix.with_name(renamed if count else f"{name}-{seq_length}")


def repack(source: TokenizedRows, options: Options, prefix: Path, fingerprint: str) -> None:
    """Read all conversations, pack them, write them, and print what was done."""
    counts = Counts()
    old = source.manifest
    is_grouped = source.groups is not None
    with ConversationStore(prefix, np.dtype(old["dtype"]), is_grouped, source.num_sources) as store:
        for unit in _fitting(units(source), options, counts):
            store.add(*unit)
        print_dropped(counts, options.seq_length, f"{unit_name(source)}s")
        if not store.num_units:
            raise UserError(
                f"no {unit_name(source)} of {source.prefix} fits into {options.seq_length} tokens: give a greater --seq-length"
            )
        packing = store.pack(options.seq_length, options.seed, options.packing)
        manifest = {name: value for name, value in old.items() if name != "row_units"}
        manifest |= store.totals(packing, options.seq_length)
        manifest |= {
            "algorithm": ALGORITHM if options.packing else "none",
            "seed": options.seed,
            "options": old.get("options", {}) | {"packing": options.packing},
            "fingerprint": fingerprint,
            "repacked": [*old.get("repacked", []), _step(source, options, counts)],
        }
        store.write(packing, manifest)
    fill = f"{100 * manifest['fill']:.1f} % full"
    print(f"packed {packed_units(manifest)} into {packing.num_rows} rows of {options.seq_length} tokens ({fill})")
    print(f"wrote {prefix}.bin, .idx, .json")


def unit_name(source: TokenizedRows) -> str:
    return "pair" if source.num_pairs else "conversation"


def units(source: TokenizedRows) -> Iterator[Unit]:
    """The conversations in the order of the rows, one by one or in pairs."""
    found = _conversations(source)
    if source.num_pairs:
        yield from zip(found, found, strict=True)
    else:
        yield from ((conversation,) for conversation in found)


def _conversations(source: TokenizedRows) -> Iterator[Conversation]:
    groups, sources = source.groups, source.sources
    for index, conversation in enumerate(conversation for row in source for conversation in _row_conversations(row)):
        group = None if groups is None else int(groups[index])
        yield replace(conversation, group=group, source=0 if sources is None else int(sources[index]))


def _row_conversations(row: Row) -> Iterator[Conversation]:
    for start, stop in row.spans.tolist():
        trained = row.trained[start:stop]
        run_ends = np.append(np.flatnonzero(np.diff(trained)) + 1, stop - start)
        yield Conversation(row.tokens[start:stop], np.diff(run_ends, prepend=0).tolist())


def _fitting(all_units: Iterator[Unit], options: Options, counts: Counts) -> Iterator[Unit]:
    """Those that fit the new length, cut if that was asked for."""
    for unit in all_units:
        length = unit_length(unit)
        if length > options.seq_length and options.overlong == "error":
            what = "pair" if len(unit) > 1 else "conversation"
            raise UserError(
                f"a {what} has {length} tokens, more than {options.seq_length}: give a greater --seq-length, "
                "or --overlong drop or truncate"
            )
        if kept := fitting(unit, options.seq_length, options.overlong, counts):
            yield kept


def _step(source: TokenizedRows, options: Options, counts: Counts) -> dict[str, Any]:
    """The manifest's entry for one repacking; conversations (or pairs) before = now + the sum of dropped."""
    old = source.manifest
    return {
        "from": source.prefix.name,
        "from_sha256": old["files"]["bin"]["sha256"],
        "from_length": old["length"],
        "from_conversations": old["conversations"],
        **({"from_pairs": old["pairs"]} if source.num_pairs else {}),
        "length": options.seq_length,
        "overlong": options.overlong,
        "dropped": dict(counts.dropped),
        "truncated": counts.num_truncated,
    }


if __name__ == "__main__":
    run(main)
