"""Carries a source through reading, rendering and tokenising, a batch at a time, and counts what becomes of its records."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from megatron.sft.chat.bpe_cache import WordEncoder, word_encoder
from megatron.sft.chat.conversations import Example, RecordReader, group_hash, join_rounds
from megatron.sft.chat.encoding import Conversation, check_against_template, encode
from megatron.sft.chat.template import ChatTemplate, CorrectionNeeded, RenderedText
from megatron.sft.data.mixture import Source
from megatron.sft.data.sources import SourceRecord
from megatron.sft.data.workers import Progress, in_order
from megatron.sft.runtime.errors import UserError

OVERLONG = ("drop", "truncate", "split", "error")
BATCH_BYTES, BATCH_CONVERSATIONS = 1 << 19, 256
BYTES_FOR_WORDS = 4 << 20  # of a source: a smaller one is tokenised before a WordEncoder has been tried out
BYTES_OF_OTHER_RECORDS = 2000  # an estimate, for records that are not JSON text
LENGTH_LIMITS = (4096, 8192, 16384, 32768)  # usual row lengths, for the report
CHECK_FIRST, CHECK_EVERY = 16, 500  # conversations whose tokens are compared with transformers' own
BAD_RECORD = "bad row"  # as manifests have called it since format 1


@dataclass
class Lengths:
    """Tokens of conversations before any was cut, split or dropped. longer: how many have more than each limit."""

    num_conversations: int = 0
    total: int = 0
    shortest: int = 0
    longest: int = 0
    longer: Counter[int] = field(default_factory=lambda: Counter(dict.fromkeys(LENGTH_LIMITS, 0)))

    def add(self, length: int) -> None:
        self.update(Lengths(1, length, length, length, Counter({limit: int(length > limit) for limit in LENGTH_LIMITS})))

    def update(self, others: "Lengths") -> None:
        if others.num_conversations:
            self.shortest = min(self.shortest, others.shortest) if self.num_conversations else others.shortest
        self.num_conversations += others.num_conversations
        self.total += others.total
        self.longest = max(self.longest, others.longest)
        self.longer.update(others.longer)


@dataclass
class Counts:
    """What became of the records of a source: num_read = num_kept + the sum of dropped."""

    num_read: int = 0
    num_kept: int = 0
    num_truncated: int = 0
    num_split: int = 0  # records that became several conversations
    num_parts: int = 0  # conversations made of those
    num_parts_dropped: int = 0  # parts of kept records that are too long or have nothing trained
    num_merged_starts: int = 0  # answers whose first token also holds a part of the header, and is not trained
    num_with_control_tokens: int = 0  # conversations with the template's special tokens in their texts
    num_without_group: int = 0  # records without the field that records are grouped by
    dropped: Counter[str] = field(default_factory=Counter)  # by the reason
    lengths: Lengths = field(default_factory=Lengths)

    def add(self, others: "Counts") -> None:
        for count in fields(self):
            mine, added = getattr(self, count.name), getattr(others, count.name)
            if isinstance(mine, int):
                setattr(self, count.name, mine + added)
            else:
                mine.update(added)


def cut_or_dropped(conversation: Conversation, seq_length: int, overlong: str, counts: Counts) -> Conversation | None:
    """The conversation, cut if it is too long and `overlong` is truncate; None if it is dropped, which is counted."""
    if len(conversation.tokens) <= seq_length:
        return conversation
    if overlong == "drop":
        counts.dropped[f"longer than {seq_length} tokens"] += 1
        return None
    cut = conversation.cut(seq_length)
    if not cut.num_trained:
        counts.dropped[f"no trained token among the first {seq_length}"] += 1
        return None
    counts.num_truncated += 1
    return cut


@dataclass(frozen=True)
class Chunk:
    """Records that one worker works on; `first` is the index of the first among all of the source."""

    first: int
    records: list[SourceRecord]


@dataclass(frozen=True)
class Outcome:
    """What became of a chunk: the conversations that are kept, and what to add to counts and sets. If there is an `error`,
    the run ends after these conversations."""

    conversations: list[Conversation]
    counts: Counts
    learned: list[Any]  # see `Corpus._learned`
    rejected: list[tuple[int, str]]  # index in the chunk, reason
    error: UserError | None


@dataclass(frozen=True)
class Pending:
    """A rendered conversation that waits for its batch to be tokenised."""

    record: SourceRecord
    index: int  # in its chunk
    example: Example
    rendered: RenderedText
    group: int | None


@dataclass
class Corpus:
    """One source and how to make conversations of it. Iterating gives those that are kept, in the order of the records.

    reject: takes each bad record and its reason; without it the first bad record is a `UserError`.
    index: the source's place among all.
    """

    source: Source
    template: ChatTemplate
    reader: RecordReader
    seq_length: int
    overlong: str
    group_key: str = ""
    seed: int = 0
    index: int = 0
    reject: Callable[[SourceRecord, str], None] | None = None
    num_workers: int = 1
    words: WordEncoder | None = None
    counts: Counts = field(default_factory=Counts)

    def __iter__(self) -> Iterator[Conversation]:
        if self.source.num_bytes >= BYTES_FOR_WORDS:
            self.words = word_encoder(self.template.tokenizer)
        progress = Progress(self.source.num_bytes)
        chunks: deque[Chunk] = deque()  # those in the hands of workers
        try:
            for outcome in in_order(self._outcome, self._chunks(chunks), self.num_workers):
                chunk = chunks.popleft()
                self._add(chunk, outcome)
                yield from outcome.conversations
                if outcome.error:
                    raise outcome.error
                progress.update(len(chunk.records), chunk.records[-1].end)
        finally:
            progress.close()

    def _chunks(self, chunks: deque[Chunk]) -> Iterator[Chunk]:
        """The records in chunks, each of which is appended to `chunks` as well."""
        first = num_bytes = 0
        records: list[SourceRecord] = []
        for record in self.source.records(self.seed, self.index):
            records.append(record)
            num_bytes += len(record.content) if isinstance(record.content, bytes) else BYTES_OF_OTHER_RECORDS
            if num_bytes >= BATCH_BYTES or len(records) >= BATCH_CONVERSATIONS:
                chunks.append(Chunk(first, records))
                yield chunks[-1]
                first, num_bytes, records = first + len(records), 0, []
        if records:
            chunks.append(Chunk(first, records))
            yield chunks[-1]

    def _outcome(self, chunk: Chunk) -> Outcome:
        """What becomes of a chunk. Runs in a worker, so it counts separately."""
        reader = replace(self.reader, formats=Counter(), ignored_fields=Counter(), placeholders=Counter())
        part = replace(self, reader=reader, counts=Counts())
        rejected: list[tuple[int, str]] = []
        conversations: list[Conversation] = []
        error: UserError | None = None
        try:
            conversations.extend(part._conversations(chunk, rejected if self.reject else None))
        except UserError as stopped:
            error = stopped
        return Outcome(conversations, part.counts, part._learned(), rejected, error)

    def _learned(self) -> list[Any]:
        """The counters and sets that reading and rendering fill; `update` adds to each of them."""
        reader, template = self.reader, self.template
        counters = [reader.formats, reader.ignored_fields, reader.placeholders]
        return [*counters, template.notes, template.end_of_turn_ids, template.control_tokens]

    def _add(self, chunk: Chunk, outcome: Outcome) -> None:
        self.counts.add(outcome.counts)
        for mine, others in zip(self._learned(), outcome.learned, strict=True):
            mine.update(others)
        for index, reason in outcome.rejected:
            assert self.reject is not None
            self.reject(chunk.records[index], reason)

    def _conversations(self, chunk: Chunk, rejected: list[tuple[int, str]] | None) -> Iterator[Conversation]:
        """The conversations of a chunk. Bad records go to `rejected`; without it the first one is an error."""
        batch = self._batch(chunk.records, rejected)
        encodings = encode(self.template.tokenizer, [pending.rendered for pending in batch], self.words)
        for pending in batch:
            try:
                encoded = next(encodings)
                index = chunk.first + pending.index
                if index < CHECK_FIRST or index % CHECK_EVERY == 0:
                    check_against_template(self.template, pending.example, encoded)
                kept = self._kept(pending.example, encoded)
            except UserError as error:
                self._refuse(pending.record, pending.index, error, rejected)
                continue
            self._count(pending, encoded)
            self.counts.num_kept += bool(kept)
            for conversation in kept:
                yield replace(conversation, group=pending.group) if pending.group is not None else conversation

    def _batch(self, records: Sequence[SourceRecord], rejected: list[tuple[int, str]] | None) -> list[Pending]:
        batch: list[Pending] = []
        for index, record in enumerate(records):
            self.counts.num_read += 1
            try:
                batch.append(self._rendered(record, index))
            except UserError as error:
                self._refuse(record, index, error, rejected)
        return batch

    def _rendered(self, record: SourceRecord, index: int) -> Pending:
        fields = record.fields
        example = self.reader.example(fields)
        if example.messages:
            rendered = self._render(example)
        else:
            rendered = self.template.render_text(example.text)
        group = group_hash(fields, self.group_key, self.reader.renamed_columns) if self.group_key else None
        return Pending(record, index, example, rendered, group)

    def _refuse(self, record: SourceRecord, index: int, error: UserError, rejected: list[tuple[int, str]] | None) -> None:
        """Set a bad record aside, or stop with its file and line."""
        if isinstance(error, CorrectionNeeded):
            raise error.at(str(record.place)) from None
        reason = str(error).removeprefix(f"{record.place}: ")
        if rejected is None:
            raise UserError(f"{record.place}: {reason}") from None
        rejected.append((index, reason))
        self.counts.dropped[BAD_RECORD] += 1

    def _count(self, pending: Pending, encoded: Conversation) -> None:
        self.counts.lengths.add(len(encoded.tokens))
        self.counts.num_without_group += pending.group is None
        self.counts.num_merged_starts += encoded.num_merged_starts
        texts = [message["content"] or "" for message in pending.example.messages] or [pending.example.text]
        if any(token in text for token in self.template.control_tokens for text in texts):
            self.counts.num_with_control_tokens += 1

    def _kept(self, example: Example, encoded: Conversation) -> list[Conversation]:
        """The conversation, cut or split if that was asked for; nothing if it is dropped."""
        if not encoded.num_trained:
            self.counts.dropped["no turn of it is trained"] += 1
            return []
        if len(encoded.tokens) > self.seq_length:
            if self.overlong == "error":
                raise UserError(
                    f"the conversation has {len(encoded.tokens)} tokens, more than LENGTH {self.seq_length}: "
                    "shorten it, give a greater LENGTH, or set OVERLONG=drop, truncate or split"
                )
            if self.overlong == "split":
                return self._split(example, encoded)
        kept = cut_or_dropped(encoded, self.seq_length, self.overlong, self.counts)
        return [kept] if kept else []

    def _split(self, example: Example, encoded: Conversation) -> list[Conversation]:
        """Parts of a conversation, cut between its rounds, that fit; every part repeats the system text and the functions."""
        if not example.messages:
            parts = encoded.pieces(self.seq_length)
            num_dropped = 0
        else:
            flags = self.template.trained_messages(example.messages, example.loss_flags)
            rounds = replace(example, loss_flags=flags).rounds()
            parts, num_dropped = self._parts(rounds)
        if not parts:
            self.counts.dropped[f"longer than {self.seq_length} tokens in every round of question and answer"] += 1
            return []
        self.counts.num_split += 1
        self.counts.num_parts += len(parts)
        self.counts.num_parts_dropped += num_dropped
        return parts

    def _parts(self, rounds: Sequence[Example]) -> tuple[list[Conversation], int]:
        """As few parts as possible, filled from the first round on, and the number of those that are dropped."""
        alone = [len(encoded.tokens) for encoded in self._encoded(rounds)]
        # What every round alone repeats of the system text: the length of the first two together shows it.
        pair = next(self._encoded([join_rounds(rounds[:2])])) if len(rounds) > 1 else None
        repeated = max(alone[0] + alone[1] - len(pair.tokens), 0) if pair else 0
        spans, start, total = [], 0, alone[0]
        for index in range(1, len(rounds)):
            total += alone[index] - repeated
            if total > self.seq_length:
                spans.append((start, index))
                start, total = index, alone[index]
        waiting = [*spans, (start, len(rounds))][::-1]
        parts, num_dropped = [], 0
        while waiting:
            start, end = waiting.pop()
            part = next(self._encoded([join_rounds(rounds[start:end])]))
            if len(part.tokens) <= self.seq_length and part.num_trained:
                parts.append(part)
            elif len(part.tokens) > self.seq_length and end - start > 1:
                waiting += [(end - 1, end), (start, end - 1)]  # the sum of lengths was an estimate
            else:
                num_dropped += 1
        return parts, num_dropped

    def _encoded(self, examples: Sequence[Example]) -> Iterator[Conversation]:
        return encode(self.template.tokenizer, list(map(self._render, examples)))

    def _render(self, example: Example) -> RenderedText:
        return self.template.render(example.messages, example.tools, example.loss_flags, example.template_kwargs)
