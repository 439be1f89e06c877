"""Shows which tokens of a row are trained: in color on a terminal, in [[ ]] elsewhere, or as an HTML page with the totals.

Of a preference pair the prompt is shown once, and both answers next to each other.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import jinja2
import numpy as np

from megatron.sft.data.tokenized import SIDES, Row, TokenizedRows
from megatron.sft.runtime.console import SIGNS

GREEN, GREY, RESET = "\x1b[32m", "\x1b[90m", "\x1b[0m"
SAMPLE_TOKENS = 600
REPEATED_CHARACTERS = 120  # at the start of a conversation, from which on they are folded
PAGE_TOKENS = 4000  # shown of a conversation on the page; of longer ones the middle is skipped
Part = tuple[str, np.ndarray, np.ndarray]  # a heading, [n] tokens, and [n] which are trained
# What commands a terminal, or cannot be seen, is shown as a sign.
INVISIBLE = SIGNS | {0x09: "⇥\t", 0xA0: "⍽", 0x200B: "⟨zero width⟩", 0xFEFF: "⟨BOM⟩"}


def color_wanted(stream: IO[str] = sys.stdout) -> bool:
    """What NO_COLOR and FORCE_COLOR say, as in most programs; otherwise whether `stream` is a terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


def legend(color: bool) -> str:
    return f"{GREEN}green{RESET} is trained, {GREY}grey{RESET} is not" if color else "[[ ]] is trained, the rest is not"


def masked_pieces(tokenizer: Any, tokens: np.ndarray, trained: np.ndarray) -> Iterator[tuple[str, bool]]:
    """The text of [n] tokens, special tokens included, in pieces that are trained (True) or not; see INVISIBLE."""
    ends = np.flatnonzero(np.diff(trained.astype(np.int8))) + 1
    for piece, mask in zip(np.split(tokens, ends), np.split(trained, ends), strict=True):
        text = tokenizer.decode(piece.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield text.translate(INVISIBLE), bool(mask[0])


def conversation_text(tokenizer: Any, tokens: np.ndarray, trained: np.ndarray, color: bool) -> str:
    """The text of [n] tokens, special tokens included, with the trained ones marked."""
    pieces = []
    for text, is_trained in masked_pieces(tokenizer, tokens, trained):
        if color:
            # Again on every line: pagers reset colors at line ends.
            start = GREEN if is_trained else GREY
            pieces.append("\n".join(f"{start}{line}{RESET}" if line else "" for line in text.split("\n")))
        else:
            pieces.append(f"[[{text}]]" if is_trained else text)
    return "".join(pieces)


def sample_text(tokenizer: Any, tokens: np.ndarray, trained: np.ndarray, color: bool) -> str:
    """`conversation_text` without the middle of a long conversation."""
    if len(tokens) <= SAMPLE_TOKENS:
        return conversation_text(tokenizer, tokens, trained, color).rstrip("\n")
    half = SAMPLE_TOKENS // 2
    start = conversation_text(tokenizer, tokens[:half], trained[:half], color)
    end = conversation_text(tokenizer, tokens[-half:], trained[-half:], color).rstrip("\n")
    return f"{start}\n… {len(tokens) - 2 * half:,} tokens not shown …\n{end}"


def units_of(row: Row, in_pairs: bool) -> Iterator[list[Part]]:
    """Every conversation of the row as one part, or every pair as its prompt and two answers."""
    parts = [(row.tokens[start:stop], row.trained[start:stop]) for start, stop in row.spans.tolist()]
    if not in_pairs:
        for index, (tokens, trained) in enumerate(parts, start=1):
            of = f"conversation {index} of {len(parts)}"
            yield [(f"{of}: {len(tokens):,} tokens, {int(trained.sum()):,} trained", tokens, trained)]
        return
    for index in range(0, len(parts), 2):
        yield pair_parts(parts[index : index + 2], f"pair {index // 2 + 1} of {len(parts) // 2}, ")


def pair_parts(pair: Sequence[tuple[np.ndarray, np.ndarray]], of: str = "") -> list[Part]:
    """The prompt of a pair, and what follows it on both sides. pair: tokens and mask of chosen and rejected."""
    length = min(int(np.flatnonzero(trained)[0]) for _, trained in pair)
    different = np.flatnonzero(pair[0][0][:length] != pair[1][0][:length])  # later turns, of which only the last is trained
    length = int(different[0]) if len(different) else length
    parts = [(f"{of}prompt: {length:,} tokens", pair[0][0][:length], pair[0][1][:length])]
    for side, (tokens, trained) in zip(SIDES, pair, strict=True):
        heading = f"{side}: {len(tokens) - length:,} tokens, {int(trained.sum()):,} trained"
        parts.append((heading, tokens[length:], trained[length:]))
    return parts


def row_text(tokenizer: Any, row: Row, color: bool, in_pairs: bool = False) -> Iterator[str]:
    """A heading and a text for every part of the row."""
    for heading, tokens, trained in (part for unit in units_of(row, in_pairs) for part in unit):
        yield f"---- {heading} ----"
        yield conversation_text(tokenizer, tokens, trained, color).rstrip("\n")


def page(tokenizer: Any, rows: TokenizedRows, indices: Iterable[int]) -> str:
    """Tokenised data as one HTML page that loads nothing else: totals, lengths of conversations, and the rows `indices`."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("page.html")
    manifest = rows.manifest
    return template.render(
        title=rows.prefix.name,
        totals=_totals(manifest),
        facts=_facts(manifest),
        sources=_sources(manifest),
        notes=manifest.get("notes", []),
        histogram=manifest.get("conversation_lengths", {}).get("histogram", []),
        num_rows=len(rows),
        rows=[(index, rows[index]) for index in indices],
        units_of=partial(units_of, in_pairs=rows.num_pairs > 0),
        pieces=_PagePieces(tokenizer).of,
        short=_short,
    )


def _totals(manifest: dict[str, Any]) -> dict[str, str]:
    """What one wants to know first."""
    tokens, trained = manifest["tokens"], manifest["trained_tokens"]
    fill = manifest.get("fill", tokens / (manifest["rows"] * manifest["length"]))
    totals = {
        "conversations": f"{manifest['conversations']:,}",
        "tokens": f"{tokens:,}",
        "trained": f"{trained:,} ({100 * trained / tokens:.1f} %)",
        f"rows of up to {manifest['length']:,} tokens": f"{manifest['rows']:,}, {100 * fill:.1f} % full",
    }
    if manifest.get("pairs"):
        totals["pairs"] = f"{manifest['pairs']:,}"
        for side, facts in manifest.get("sides", {}).items():
            totals[side] = f"{facts['tokens']:,} tokens, {facts['trained_tokens']:,} trained"
    return totals


def _facts(manifest: dict[str, Any]) -> list[str]:
    """The rest of the totals, in small print."""
    facts = []
    if lengths := manifest.get("conversation_lengths"):
        named = (f"{name} {lengths[name]:,.0f}" for name in ("mean", "median", "longest"))
        facts.append(f"tokens of a conversation: {', '.join(named)}")
    facts.append(f"packing: {manifest.get('algorithm', '')}, seed {manifest.get('seed', '')}")
    facts.append(f"tokenizer: {manifest.get('tokenizer', {}).get('name', '')}")
    if "groups" in manifest:
        facts.append(f"groups: {manifest['groups']:,} by {manifest.get('group_key')}")
    return facts


def _short(number: int) -> str:
    """`950`, `1.2k`, `16k`, `3M`: for labels of bars."""
    for unit, size in (("M", 1_000_000), ("k", 1000)):
        if number >= size:
            return f"{number / size:.1f}".removesuffix(".0") + unit if number < 10 * size else f"{number // size}{unit}"
    return str(number)


def _sources(manifest: dict[str, Any]) -> list[list[str]]:
    """Table lines of inputs and of later packings: path, read, kept, cut, dropped with the reasons."""
    lines = []
    for source in manifest.get("sources", []):
        counts = [source.get(name, 0) for name in ("read", "kept", "truncated")]
        lines.append((source.get("path", ""), counts, source.get("dropped", {})))
    for step in manifest.get("repacked", []):
        before, dropped = step.get("from_pairs", step["from_conversations"]), step["dropped"]
        counts = [before, before - sum(dropped.values()), step["truncated"]]
        lines.append((f"packed again from {step['from']}", counts, dropped))
    return [
        [path, *map("{:,}".format, counts), "; ".join(f"{count:,} {why}" for why, count in dropped.items()) or "none"]
        for path, counts, dropped in lines
    ]


class _PagePieces:
    """The pieces of one conversation after another; a long beginning like that of the one before, a system prompt for example,
    is one piece."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before: list[str] = []  # lines of the last conversation's beginning

    def of(self, tokens: np.ndarray, trained: np.ndarray) -> Iterator[tuple[str, str]]:
        """(text, kind) with the kinds trained, read, repeated and skipped."""
        num_skipped = len(tokens) - PAGE_TOKENS
        parts = [slice(None)] if num_skipped <= 0 else [slice(None, PAGE_TOKENS // 2), slice(-(PAGE_TOKENS // 2), None)]
        for index, part in enumerate(parts):
            if index:
                yield f"\n… {num_skipped:,} tokens not shown …\n", "skipped"
            for number, (shown, is_trained) in enumerate(masked_pieces(self._tokenizer, tokens[part], trained[part])):
                if not index and not number and not is_trained:
                    lines = shown.splitlines(keepends=True)
                    equal = [mine == other for mine, other in zip(lines, self._before, strict=False)]
                    shared = "".join(lines[: [*equal, False].index(False)])
                    self._before = lines
                    if len(shared) >= REPEATED_CHARACTERS:
                        yield shared, "repeated"
                        shown = shown[len(shared) :]
                yield shown, "trained" if is_trained else "read"
