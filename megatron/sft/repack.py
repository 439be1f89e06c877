"""Packs tokenised data anew, to another length, seed or packing, without tokenising again. `tools/repack` runs

    python -m megatron.sft.repack PREFIX --seq-length 8192

Conversations, masks and groups come from the existing files; what tokenising dropped or cut does not come back.
"""

import argparse
import re
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron.sft.chat.encoding import Conversation
from megatron.sft.data.packing import ALGORITHM
from megatron.sft.data.store import ConversationStore
from megatron.sft.data.tokenized import Row, TokenizedRows, file_of, prefix_of
from megatron.sft.runtime.errors import OneLineParser, UserError, run
from megatron.sft.runtime.manifest import sha256_of_text

OVERLONG = ("drop", "truncate", "error")


@dataclass(frozen=True)
class Options:
    """What the new rows are to be."""

    length: int
    seed: int
    packing: bool
    overlong: str


@dataclass
class Counts:
    """What became of the conversations that do not fit the new length."""

    num_truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def main(argv: Sequence[str] | None = None) -> int:
    given = _parse(argv)
    signal.signal(signal.SIGTERM, _stop)
    source = TokenizedRows(prefix_of(given.prefix))
    old = source.manifest
    options = Options(
        length=given.seq_length or old["length"],
        seed=old.get("seed", 1234) if given.seed is None else given.seed,
        packing=not given.no_packing,
        overlong=given.overlong,
    )
    prefix = given.output_prefix or new_prefix(source, options.length)
    fingerprint = sha256_of_text(
        repr(("repack", ALGORITHM, old["files"]["bin"]["sha256"], old["files"]["idx"], options))
    )
    if _is_finished(prefix, fingerprint):
        print(f"already packed so, from the same files: {prefix}.bin, .idx, .json")
        return 0
    repack(source, options, prefix, fingerprint)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="repack", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prefix", type=Path, help="the files' common name; with or without .bin, .idx or .json")
    parser.add_argument("--seq-length", type=_at_least(1), help="tokens in a row; default: as it is")
    parser.add_argument("--seed", type=_at_least(0), help="default: as it is")
    parser.add_argument("--no-packing", action="store_true", help="one conversation a row")
    parser.add_argument("--overlong", choices=OVERLONG, default="drop", help="what to do with longer conversations")
    parser.add_argument("--output-prefix", type=Path, help="default: the same name with the new length")
    return parser.parse_args(argv)


def _at_least(least: int) -> Any:
    def number(text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text) < 1 << 62):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return number


def _stop(signal_number: int, frame: object) -> None:
    raise SystemExit(128 + signal_number)


def new_prefix(source: TokenizedRows, length: int) -> Path:
    """The name with `length` in place of the old length, as scripts/3_tokenize.sh writes it, or after it."""
    old_length, name = source.manifest["length"], source.prefix.name
    if length == old_length:
        return source.prefix
    renamed, count = re.subn(rf"-{old_length}(?=_text_document$|$)", f"-{length}", name)
    return source.prefix.with_name(renamed if count else f"{name}-{length}")


def _is_finished(prefix: Path, fingerprint: str) -> bool:
    """Whether the result is in place."""
    if not file_of(prefix, "json").is_file():
        return False
    try:
        return TokenizedRows(prefix).manifest.get("fingerprint") == fingerprint
    except UserError:
        return False


def repack(source: TokenizedRows, options: Options, prefix: Path, fingerprint: str) -> None:
    """Read all conversations, pack them, write them, and say what was done."""
    counts = Counts()
    old = source.manifest
    dtype = np.dtype(old["dtype"])
    with ConversationStore(prefix, dtype, source.groups is not None, source.num_sources) as store:
        for conversation in _fitting(conversations(source), options, counts):
            store.add(conversation)
        _print_counts(counts, options)
        if not len(store.lengths):
            raise UserError(
                f"no conversation of {source.prefix} fits into {options.length} tokens: give a greater length"
            )
        packing = store.pack(options.length, options.seed, options.packing)
        manifest = (
            old
            | store.totals(packing, options.length)
            | {
                "algorithm": ALGORITHM if options.packing else "none",
                "seed": options.seed,
                "options": old.get("options", {}) | {"packing": options.packing},
                "fingerprint": fingerprint,
                "repacked": [*old.get("repacked", []), _step(source, options, counts)],
            }
        )
        if not packing.joined.any():
            manifest.pop("row_units", None)
        store.write(packing, manifest)
    fill = f"{100 * manifest['fill']:.1f} % full"
    print(f"packed {len(store.lengths)} conversations into {packing.num_rows} rows of {options.length} tokens ({fill})")
    print(f"wrote {prefix}.bin, .idx, .json")


def conversations(source: TokenizedRows) -> Iterator[Conversation]:
    """The conversations in the order of the rows."""
    groups, sources = source.groups, source.sources
    number = 0
    for row in source:
        for conversation in conversations_of(row):
            group = None if groups is None else int(groups[number])
            yield replace(conversation, group=group, source=0 if sources is None else int(sources[number]))
            number += 1


def conversations_of(row: Row) -> Iterator[Conversation]:
    start = 0
    for length in row.conversation_lengths.tolist():
        part = slice(start, start + length)
        trained = row.trained[part]
        ends_of_runs = np.append(np.flatnonzero(np.diff(trained)) + 1, length)
        yield Conversation(row.tokens[part], np.diff(ends_of_runs, prepend=0).tolist())
        start += length


def _fitting(all_of_them: Iterator[Conversation], options: Options, counts: Counts) -> Iterator[Conversation]:
    """Those that fit the new length, and what is left of the others."""
    for conversation in all_of_them:
        length = len(conversation.tokens)
        if length <= options.length:
            yield conversation
        elif options.overlong == "error":
            raise UserError(
                f"a conversation has {length} tokens, more than {options.length}: give a greater length, "
                "or --overlong drop or truncate"
            )
        elif options.overlong == "drop":
            counts.dropped[f"longer than {options.length} tokens"] += 1
        elif (cut := conversation.cut(options.length)).num_trained:
            counts.num_truncated += 1
            yield cut
        else:
            counts.dropped[f"no trained token among the first {options.length}"] += 1


def _step(source: TokenizedRows, options: Options, counts: Counts) -> dict[str, Any]:
    """The manifest's record of one repacking; conversations before = conversations now + the sum of dropped."""
    old = source.manifest
    return {
        "from": source.prefix.name,
        "from_sha256": old["files"]["bin"]["sha256"],
        "from_length": old["length"],
        "from_conversations": old["conversations"],
        "length": options.length,
        "overlong": options.overlong,
        "dropped": dict(counts.dropped),
        "truncated": counts.num_truncated,
    }


def _print_counts(counts: Counts, options: Options) -> None:
    for reason, count in counts.dropped.items():
        print(f"dropped {count} conversations: {reason}")
    if counts.num_truncated:
        print(f"cut {counts.num_truncated} conversations at {options.length} tokens: their last answer has no end")


if __name__ == "__main__":
    run(main)
