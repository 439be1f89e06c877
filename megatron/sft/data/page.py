"""Tokenised data as one HTML page that needs nothing else: the totals, the lengths of conversations, and some rows with the
trained text marked and the borders of conversations drawn."""

from collections.abc import Iterable
from html import escape
from string import Template
from typing import Any

import numpy as np

from megatron.sft.data.preview import masked_pieces
from megatron.sft.data.tokenized import Row, TokenizedRows

SHOWN_TOKENS = 4000  # of a conversation; the middle of longer ones is left out
INVISIBLE = {
    ord("\t"): "⇥\t",
    ord("\r"): "␍",
    ord("\u00a0"): "⍽",
    ord("\u200b"): "⟨zero width⟩",
    ord("\ufeff"): "⟨BOM⟩",
}

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --page: #fbfbfa; --ink: #1b1f24; --soft: #626b75; --line: #d5d9de; --card: #fff;
  --trained: #0f6b34; --trained-back: #dcf5e3; --bar: #3f7fc1; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e4e7ea; --soft: #98a2ad; --line: #353c44;
  --card: #1c2024; --trained: #8fe3ad; --trained-back: #12391f; --bar: #5b9bdd; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 74rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.25rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11.5rem, 1fr)); gap: .6rem; margin: 0; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .45rem .7rem; }
dt { color: var(--soft); font-size: .82rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; font-weight: 600; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: normal; font-size: .82rem; }
svg { display: block; width: 100%; height: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg rect { fill: var(--bar); }
svg line { stroke: var(--line); }
.legend, .note { color: var(--soft); }
.row { border: 1px solid var(--line); border-radius: 6px; background: var(--card); margin: 0 0 1.2rem; overflow: hidden; }
.row > header { padding: .45rem .8rem; border-bottom: 1px solid var(--line); font-weight: 600; }
.conversation { border-left: 4px solid var(--bar); padding: .5rem .8rem; }
.conversation + .conversation { border-top: 2px dashed var(--bar); }
.conversation > header { color: var(--soft); font-size: .82rem; }
pre { margin: .3rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; color: var(--soft);
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
mark { background: var(--trained-back); color: var(--trained); border-radius: 3px; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; padding: 1px 0; }
.left-out { display: inline-block; color: var(--ink); font-style: italic; }
</style>
</head>
<body>
<h1>$title</h1>
<dl>$totals</dl>
<h2>Where the conversations come from</h2>
<table>$sources</table>
$notes
<h2>Lengths of conversations, in tokens</h2>
$histogram
<h2>Rows</h2>
<p class="legend"><mark>marked text is trained</mark>; grey text is read, and not trained; a dashed line is the border
between two conversations, which nothing crosses.</p>
$rows
</body>
</html>
""")


def page(tokenizer: Any, rows: TokenizedRows, numbers: Iterable[int]) -> str:
    """The page, with the rows of these numbers."""
    manifest = rows.manifest
    facts = {name: escape(value) for name, value in totals(manifest).items()}
    notes = "".join(f'<p class="note">Note: {escape(note)}</p>' for note in manifest.get("notes", []))
    return PAGE.substitute(
        title=escape(rows.prefix.name),
        totals="".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items()),
        sources=_sources(manifest),
        notes=notes,
        histogram=_histogram(manifest.get("conversation_lengths", {}).get("histogram", [])),
        rows="\n".join(_row(tokenizer, rows[number], number, len(rows)) for number in numbers),
    )


def totals(manifest: dict[str, Any]) -> dict[str, str]:
    """The manifest's numbers in words for people."""
    tokens, trained = manifest["tokens"], manifest["trained_tokens"]
    facts = {
        "rows": f"{manifest['rows']:,}, of up to {manifest['length']:,} tokens",
        "conversations": f"{manifest['conversations']:,}",
        "tokens": f"{tokens:,}",
        "trained": f"{trained:,} ({100 * trained / tokens:.1f} %)",
        "fill": f"{100 * manifest.get('fill', tokens / (manifest['rows'] * manifest['length'])):.2f} %",
        "packing": f"{manifest.get('algorithm', '')}, seed {manifest.get('seed', '')}",
        "tokenizer": manifest.get("tokenizer", {}).get("name", ""),
    }
    if "groups" in manifest:
        facts["groups"] = f"{manifest['groups']:,} by {manifest.get('group_key')}"
    lengths = manifest.get("conversation_lengths")
    if lengths:
        facts["length, mean"] = f"{lengths['mean']:,.0f}"
        facts["length, median"] = f"{lengths['median']:,}"
        facts["length, longest"] = f"{lengths['longest']:,}"
    return facts


def _sources(manifest: dict[str, Any]) -> str:
    head = "<tr><th>file</th><th>read</th><th>kept</th><th>cut</th><th>dropped</th></tr>"
    lines = []
    for source in manifest.get("sources", []):
        dropped = "; ".join(f"{count:,} {reason}" for reason, count in source.get("dropped", {}).items()) or "none"
        numbers = [f"{source.get(name, 0):,}" for name in ("read", "kept", "truncated")]
        cells = [str(source.get("path", "")), *numbers, dropped]
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    for step in manifest.get("repacked", []):
        dropped = "; ".join(f"{count:,} {reason}" for reason, count in step["dropped"].items()) or "none"
        before = step["from_conversations"]
        numbers = [f"{n:,}" for n in (before, before - sum(step["dropped"].values()), step["truncated"])]
        cells = [f"packed anew from {step['from']}", *numbers, dropped]
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return head + "".join(lines)


def _histogram(histogram: list[list[int]]) -> str:
    """Bars of equal width for [[up_to, count], …]."""
    if not histogram:
        return '<p class="note">The manifest has no lengths: it is of an older version.</p>'
    width, height, left, bottom = 960.0, 220.0, 12.0, 22.0
    step = (width - 2 * left) / len(histogram)
    highest = max(count for _, count in histogram)
    every = max(1, round(64 / step))  # labels that do not touch
    parts = [f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="histogram of lengths">']
    floor = height - bottom
    parts.append(f'<line x1="{left}" y1="{floor}" x2="{width - left}" y2="{floor}"/>')
    previous = 0
    for index, (up_to, count) in enumerate(histogram):
        tall = (floor - 24) * count / highest
        x = left + index * step
        bar = f'<rect x="{x + 1:.1f}" y="{floor - tall:.1f}" width="{max(1.0, step - 2):.1f}" height="{tall:.1f}">'
        parts.append(f"{bar}<title>{previous + 1:,} to {up_to:,} tokens: {count:,} conversations</title></rect>")
        middle = x + step / 2
        if index % every == 0:
            parts.append(f'<text x="{middle:.1f}" y="{height - 7}" text-anchor="middle">≤ {up_to:,}</text>')
        if count == highest:
            parts.append(f'<text x="{middle:.1f}" y="{floor - tall - 6:.1f}" text-anchor="middle">{count:,}</text>')
        previous = up_to
    return "".join([*parts, "</svg>"])


def _row(tokenizer: Any, row: Row, number: int, num_rows: int) -> str:
    share = 100 * row.trained.mean()
    heading = f"row {number:,} of {num_rows:,}: {len(row.tokens):,} tokens, {share:.1f} % trained"
    parts = [f'<section class="row"><header>{heading}</header>']
    start = 0
    for index, length in enumerate(row.conversation_lengths.tolist(), start=1):
        part = slice(start, start + length)
        tokens, trained = row.tokens[part], row.trained[part]
        heading = f"conversation {index} of {len(row.conversation_lengths)}: {length:,} tokens, {int(trained.sum()):,} trained"
        text = _conversation(tokenizer, tokens, trained)
        parts.append(f'<div class="conversation"><header>{heading}</header><pre>{text}</pre></div>')
        start += length
    return "".join([*parts, "</section>"])


def _conversation(tokenizer: Any, tokens: np.ndarray, trained: np.ndarray) -> str:
    if len(tokens) <= SHOWN_TOKENS:
        return _marked(tokenizer, tokens, trained)
    half = SHOWN_TOKENS // 2
    left_out = f'\n<span class="left-out">… {len(tokens) - 2 * half:,} tokens not shown …</span>\n'
    start, end = slice(None, half), slice(-half, None)
    return _marked(tokenizer, tokens[start], trained[start]) + left_out + _marked(tokenizer, tokens[end], trained[end])


def _marked(tokenizer: Any, tokens: np.ndarray, trained: np.ndarray) -> str:
    pieces = []
    for text, is_trained in masked_pieces(tokenizer, tokens, trained):
        safe = escape(text.translate(INVISIBLE))
        pieces.append(f"<mark>{safe}</mark>" if is_trained else safe)
    return "".join(pieces)
