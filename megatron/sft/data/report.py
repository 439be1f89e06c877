"""What step 3 says of its sources, on the screen and in the manifest: every row that was read is accounted for."""

from typing import Any

import numpy as np

from megatron.sft.chat.encoding import Conversation
from megatron.sft.chat.template import ChatTemplate
from megatron.sft.data.corpus import Corpus
from megatron.sft.data.preview import colour_wanted, legend, sample_text


def source_facts(corpus: Corpus) -> dict[str, Any]:
    counts, source = corpus.counts, corpus.source
    return {
        "path": source.input.name if source.input.is_on_hub else str(source.input.path.resolve()),
        "sha256": source.sha256,
        "format": " and ".join(sorted(corpus.reader.formats)),
        "file_format": source.file_format,
        "amount": source.input.amount or None,
        "rows": source.num_rows or counts.num_read,
        "read": counts.num_read,
        "kept": counts.num_kept,
        "dropped": dict(counts.dropped),
        "truncated": counts.num_truncated,
        "split": {"rows": counts.num_split, "parts": counts.num_parts, "parts_dropped": counts.num_parts_dropped},
        "ignored_fields": dict(corpus.reader.ignored_fields),
    }


def print_sample(number: int, tokenizer: Any, conversation: Conversation) -> None:
    trained = np.repeat(np.arange(len(conversation.mask_run_lengths)) % 2 == 1, conversation.mask_run_lengths)
    colour = colour_wanted()
    print(f"---- sample {number}: {len(trained)} tokens; {legend(colour)} ----")
    print(sample_text(tokenizer, conversation.tokens, trained, colour), flush=True)


def print_counts(corpus: Corpus) -> None:
    """Everything of a source that was read, ignored, dropped or cut, once."""
    counts, source = corpus.counts, corpus.source
    of = f" ({source.input.amount} of {source.num_rows:,})" if source.wanted is not None else ""
    print(f"---- read {counts.num_read:,} rows{of} of {source.input.name} ({source.file_format}) ----")
    for name, count in sorted(corpus.reader.formats.items()):
        print(f"format: {name}, {count:,} rows")
    for name, count in corpus.reader.ignored_fields.most_common():
        if name != corpus.group_key:
            print(f"not used: field {name!r} of {count} rows")
    for reason, count in counts.dropped.items():
        print(f"dropped {count} conversations: {reason}")
    if counts.num_truncated:
        print(f"cut {counts.num_truncated} conversations at {corpus.length} tokens: their last answer has no end")
    if counts.num_split:
        dropped = f", {counts.num_parts_dropped} parts dropped" if counts.num_parts_dropped else ""
        print(
            f"split {counts.num_split} conversations into {counts.num_parts} of at most {corpus.length} tokens{dropped}"
        )
    if corpus.group_key and counts.num_without_group:
        print(f"note: {counts.num_without_group} rows have no field {corpus.group_key!r}: each is a group of its own")
    if counts.num_with_control_tokens:
        count = counts.num_with_control_tokens
        print(f"note: {count} conversations have the chat template's own special tokens in their texts")
    if counts.num_merged_starts:
        print(f"note: {counts.num_merged_starts} answers begin inside a token of the header, which is not trained")


def print_notes(template: ChatTemplate) -> None:
    for note in sorted(template.notes):
        print(f"note: {note}")
