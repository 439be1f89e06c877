"""What step 3 reports of its sources: on the screen, in the manifest, and in a file of bad records."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron.sft.chat.template import ChatTemplate
from megatron.sft.data.corpus import Corpus
from megatron.sft.data.counts import Counts, Lengths, Unit
from megatron.sft.data.pairs import PAIR
from megatron.sft.data.preview import color_wanted, legend, pair_parts, sample_text
from megatron.sft.data.sources import SourceRecord
from megatron.sft.hf.tokenizer_files import chat_template_sha256, tokenizer_sha256
from megatron.sft.runtime import exact_json
from megatron.sft.runtime.errors import UserError


class RejectedRecords:
    """Writes bad records with the reasons to <data>.rejected.jsonl, so that they can be inspected and fixed.

    The file gets its name only when `keep` is called; without bad records `keep` removes an old one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_records = 0
        self._temporary = path.with_name(f".{path.name}.tmp")

    def __enter__(self) -> "RejectedRecords":
        return self

    def __exit__(self, *error: object) -> None:
        self._temporary.unlink(missing_ok=True)

    def add(self, record: SourceRecord, reason: str) -> None:
        content: Any = record.content
        if isinstance(content, bytes):
            content = content.decode("utf-8", errors="backslashreplace")
        elif not isinstance(content, dict):
            content = None
        line = {"file": str(record.path), record.unit: record.number, "reason": reason, "row": content}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._temporary, "ab" if self.num_records else "wb") as file:
            file.write(exact_json.dumps(line, default=repr) + b"\n")
        self.num_records += 1

    def keep(self) -> None:
        if self.num_records:
            os.replace(self._temporary, self.path)
        else:
            self.path.unlink(missing_ok=True)


def source_facts(corpus: Corpus) -> dict[str, Any]:
    """The manifest's entry for a source; `read` = `kept` + the sum of `dropped`."""
    counts, source = corpus.counts, corpus.source
    return {
        "path": source.input.name if source.input.is_on_hub else str(source.input.path.resolve()),
        "sha256": source.sha256,
        "format": " and ".join(sorted(corpus.reader.formats)),
        "file_format": source.file_format,
        "amount": source.input.amount or None,
        "rows": source.num_records or counts.num_read,
        "read": counts.num_read,
        "kept": counts.num_kept,
        "dropped": dict(counts.dropped),
        "truncated": counts.num_truncated,
        "split": {"rows": counts.num_split, "parts": counts.num_parts, "parts_dropped": counts.num_parts_dropped},
        "ignored_fields": dict(corpus.reader.ignored_fields),
    }


def tokenizer_facts(folder: Path, template: ChatTemplate) -> dict[str, Any]:
    """The manifest's entry for the tokenizer, which training compares with the model's."""
    return {
        "path": str(folder.resolve()),
        "name": Path(os.path.abspath(folder)).name,
        "sha256": tokenizer_sha256(folder),
        "chat_template_sha256": chat_template_sha256(folder),
        "eos_token_id": template.tokenizer.eos_token_id,
        "bos_token_id": template.tokenizer.bos_token_id,
        "end_of_turn_ids": sorted(template.end_of_turn_ids),
    }


def units_name(corpus: Corpus) -> str:
    """What a source's records become."""
    return "pairs" if PAIR in corpus.kinds else "conversations"


def nothing_left(names: str, corpora: Sequence[Corpus]) -> UserError:
    """Why no row can be made of the sources with these names."""
    if not any(corpus.counts.num_read for corpus in corpora):
        return UserError(f"{names} has no record: give a file with at least one; nothing was written")
    what = units_name(corpora[0]).removesuffix("s")
    return UserError(f"no {what} of {names} is left, see the reasons above: nothing was written")


def length_facts(corpora: Sequence[Corpus]) -> dict[str, Any]:
    """The manifest's entry for the lengths of all conversations, or pairs, that were read, whatever became of them."""
    lengths = Lengths()
    for corpus in corpora:
        lengths.update(corpus.counts.lengths)
    return {
        units_name(corpora[0]): lengths.num_units,
        "shortest": lengths.shortest,
        "mean": lengths.total / max(lengths.num_units, 1),
        "longest": lengths.longest,
        "longer_than": {str(limit): count for limit, count in lengths.longer.items()},
    }


def lengths_line(facts: dict[str, Any]) -> str:
    of_pairs = "pairs" in facts
    number = max(facts["pairs" if of_pairs else "conversations"], 1)
    shares = (f"{int(limit) // 1024}k: {100 * count / number:.1f} %" for limit, count in facts["longer_than"].items())
    sizes = f"min {facts['shortest']:,}, mean {facts['mean']:,.1f}, max {facts['longest']:,} tokens"
    return f"lengths{' of pairs, both sides together' if of_pairs else ''}: {sizes}; longer than {', '.join(shares)}"


def print_totals(totals: dict[str, Any]) -> None:
    """What all sources together became, of the manifest's totals."""
    if "groups" in totals:
        several = sum(count for size, count in totals.get("row_units", {}).items() if size != "1")
        print(f"{totals['groups']:,} groups; {several:,} of them take several rows, which training keeps together")
    print(lengths_line(totals["read_lengths"]))
    fill = f"{100 * totals['fill']:.1f} % full"
    print(f"packed {packed_units(totals)} into {totals['rows']} rows ({fill})")
    print(f"trained {100 * totals['trained_tokens'] / totals['tokens']:.1f} % of {totals['tokens']:,} tokens")
    for side, facts in totals.get("sides", {}).items():
        mean = facts["tokens"] / totals["pairs"]
        print(f"{side}: {facts['tokens']:,} tokens, {facts['trained_tokens']:,} of them trained; {mean:,.1f} tokens on average")


def packed_units(totals: dict[str, Any]) -> str:
    """How many conversations, or pairs of two, there are."""
    return f"{totals['pairs']} pairs" if "pairs" in totals else f"{totals['conversations']} conversations"


def print_sample(number: int, tokenizer: Any, unit: Unit) -> None:
    masks = [np.repeat(np.arange(len(one.mask_run_lengths)) % 2 == 1, one.mask_run_lengths) for one in unit]
    color = color_wanted()
    tqdm.write(f"---- sample {number}: {sum(map(len, masks))} tokens; {legend(color)} ----")
    if len(unit) == 1:
        tqdm.write(sample_text(tokenizer, unit[0].tokens, masks[0], color))
        return
    for heading, tokens, trained in pair_parts([(one.tokens, mask) for one, mask in zip(unit, masks, strict=True)]):
        print(f"-- {heading} --")
        tqdm.write(sample_text(tokenizer, tokens, trained, color))


def print_corpus(corpus: Corpus) -> None:
    """Everything of a source that was read, ignored, dropped or cut, once."""
    counts, source = corpus.counts, corpus.source
    of = f" ({source.input.amount} of {source.num_records:,})" if source.wanted is not None else ""
    print(f"---- read {counts.num_read:,} records{of} of {source.input.name} ({source.file_format}) ----")
    for name, count in sorted(corpus.reader.formats.items()):
        print(f"format: {name}, {count:,} records")
    for name, count in corpus.reader.ignored_fields.most_common():
        if name != corpus.group_key:
            print(f"not used: field {name!r} of {count} records")
    print_dropped(counts, corpus.seq_length, units_name(corpus))
    if counts.num_split:
        dropped = f", {counts.num_parts_dropped} parts dropped" if counts.num_parts_dropped else ""
        parts = f"{counts.num_parts} of at most {corpus.seq_length} tokens{dropped}"
        print(f"split {counts.num_split} conversations into {parts}")
    if corpus.group_key and counts.num_without_group:
        print(f"note: {counts.num_without_group} records have no field {corpus.group_key!r}: each is its own group")
    if counts.num_scored_lower:
        what = "pairs score their chosen answer below the rejected one: are the sides exchanged?"
        print(f"note: {counts.num_scored_lower:,} {what}")
    if counts.num_with_control_tokens:
        count = counts.num_with_control_tokens
        print(f"note: {count} {units_name(corpus)} have the chat template's own special tokens in their texts")
    if counts.num_merged_starts:
        print(f"note: {counts.num_merged_starts} answers begin inside a token of the header, which is not trained")


def print_dropped(counts: Counts, seq_length: int, units: str = "conversations") -> None:
    for reason, count in counts.dropped.items():
        print(f"dropped {count} {units}: {reason}")
    if counts.num_truncated:
        end = "their last answer has no end" if units == "conversations" else "a side that was cut has no end"
        print(f"cut {counts.num_truncated} {units} at {seq_length} tokens: {end}")


def placeholder_notes(replaced: dict[str, str | None], corpora: Sequence[Corpus]) -> list[str]:
    """What MODEL_NAME and MODEL_AUTHOR replaced, or did not, in all sources."""
    found = sum((corpus.reader.placeholders for corpus in corpora), Counter())
    notes = []
    for placeholder, value in replaced.items():
        name = placeholder.strip("{}")
        counts = {written: count for written, count in found.items() if written.strip("{} \t\n").upper() == name}
        written = ", ".join(f"{text} of {count:,} texts" for text, count in sorted(counts.items()))
        if value is not None:
            use = f"stands for {written}" if written else f"is never used: the data has no {placeholder}"
            notes.append(f"MODEL_{name}={value!r} {use}")
        elif written:
            notes.append(f"{written} stays as it is: set MODEL_{name} if it stands for a name")
    return notes
