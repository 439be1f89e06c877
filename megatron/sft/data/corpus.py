"""Carries a file through reading, rendering and tokenising, a batch at a time, and counts what becomes of its rows."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron.sft.data.chat import ChatTemplate, Rendered
from megatron.sft.data.conversations import Conversation, RowReader
from megatron.sft.data.encoding import Encoded, check_against_template, encode
from megatron.sft.data.groups import group_of
from megatron.sft.data.progress import Progress
from megatron.sft.data.sources import read_rows
from megatron.sft.errors import UserError

OVERLONG = ("drop", "truncate", "error")  # a place for `split`, by turns
BATCH_CHARACTERS, BATCH_CONVERSATIONS = 1 << 20, 512
CHECK_FIRST, CHECK_EVERY = 16, 500  # conversations whose tokens are compared with transformers' own


@dataclass
class Counts:
    """What became of the rows of a file: num_read = num_kept + the sum of dropped."""

    num_read: int = 0
    num_kept: int = 0
    num_truncated: int = 0
    num_merged_starts: int = 0  # answers whose first token holds a part of the header, too, and is not trained
    num_without_group: int = 0  # rows without the field by which rows are grouped
    num_with_control_tokens: int = 0  # conversations with the template's own special tokens in their texts
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Batched:
    """A conversation that waits for its batch to be tokenised."""

    line: int
    messages: Conversation
    rendered: Rendered
    group: int | None


@dataclass
class Corpus:
    """One file, and what to do with its conversations. Iterating gives those that are kept, in file order."""

    path: Path
    template: ChatTemplate
    reader: RowReader
    length: int
    overlong: str
    group_key: str = ""
    counts: Counts = field(default_factory=Counts)

    def __iter__(self) -> Iterator[Encoded]:
        for batch in self._batches():
            conversations = encode(self.template.tokenizer, [one.rendered for one in batch])
            for one in batch:
                with self._at(one.line):
                    encoded = next(conversations)
                    if self.counts.num_read < CHECK_FIRST or self.counts.num_read % CHECK_EVERY == 0:
                        check_against_template(self.template, one.messages, encoded)
                    self._count(one, encoded)
                    fitting = self._fitting(encoded)
                if fitting:
                    self.counts.num_kept += 1
                    yield replace(fitting, group=one.group)

    def _batches(self) -> Iterator[list[Batched]]:
        batch: list[Batched] = []
        num_characters = 0
        progress = Progress(self.path.stat().st_size)
        for row in read_rows(self.path):
            with self._at(row.line):
                messages = self.reader.conversation(row.fields)
                rendered = self.template.render(messages)
            group = group_of(row.fields, self.group_key, self.reader.renamed_columns) if self.group_key else None
            batch.append(Batched(row.line, messages, rendered, group))
            num_characters += len(rendered.text)
            if num_characters >= BATCH_CHARACTERS or len(batch) >= BATCH_CONVERSATIONS:
                yield batch
                progress.update(len(batch), row.end)
                batch, num_characters = [], 0
        if batch:
            yield batch
        progress.close()

    @contextmanager
    def _at(self, line: int) -> Iterator[None]:
        """File and line in front of what is wrong."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.path}, line {line}: {error}") from None

    def _count(self, one: Batched, encoded: Encoded) -> None:
        self.counts.num_read += 1
        self.counts.num_without_group += one.group is None
        self.counts.num_merged_starts += encoded.num_merged_starts
        texts = [message["content"] for message in one.messages]
        if any(token in text for token in self.template.control_tokens for text in texts):
            self.counts.num_with_control_tokens += 1

    def _fitting(self, encoded: Encoded) -> Encoded | None:
        """The conversation, cut if that was asked for; None if it is dropped."""
        if len(encoded.tokens) <= self.length:
            return encoded
        if self.overlong == "error":
            raise UserError(
                f"the conversation has {len(encoded.tokens)} tokens, more than LENGTH {self.length}: "
                "shorten it, give a greater LENGTH, or set OVERLONG=drop or truncate"
            )
        if self.overlong == "drop":
            self.counts.dropped[f"longer than {self.length} tokens"] += 1
            return None
        cut = encoded.cut(self.length)
        if not cut.num_trained:
            self.counts.dropped[f"no trained token among the first {self.length}"] += 1
            return None
        self.counts.num_truncated += 1
        return cut
