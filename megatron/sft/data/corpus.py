"""Carries a source through reading, rendering and tokenising, a batch at a time, and counts what becomes of its records."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron.sft.chat.bpe_cache import WordEncoder, word_encoder
from megatron.sft.chat.conversations import Example, Pair, RecordReader, group_hash, join_rounds
from megatron.sft.chat.encoding import Conversation, check_against_template, encode
from megatron.sft.chat.template import ChatTemplate, CorrectionNeeded, RenderedText
from megatron.sft.data.counts import BAD_RECORD, Counts, Unit, fitting, unit_length
from megatron.sft.data.mixture import Source
from megatron.sft.data.pairs import CONVERSATION, PAIR, check_kind, check_pair
from megatron.sft.data.sources import SourceRecord
from megatron.sft.data.workers import Progress, in_order
from megatron.sft.runtime.errors import UserError

OVERLONG = ("drop", "truncate", "split", "error")
BATCH_BYTES, BATCH_CONVERSATIONS = 1 << 19, 256
BYTES_FOR_WORDS = 4 << 20  # of a source: a smaller one is tokenised before a WordEncoder has been tried out
BYTES_OF_OTHER_RECORDS = 2000  # an estimate, for records that are not JSON text
LONG_PAIR = ("two conversations of the pair, which share a row, have", "drop or truncate")
CHECK_FIRST, CHECK_EVERY = 16, 500  # conversations whose tokens are compared with transformers' own


@dataclass(frozen=True)
class Chunk:
    """Records that one worker works on; `first` is the index of the first among all of the source."""

    first: int
    records: list[SourceRecord]


@dataclass(frozen=True)
class Outcome:
    """What became of a chunk: the units that are kept, and what to add to counts and sets. `kinds` has the index in the chunk
    of the first record of each kind. If there is an `error`, the run ends after these units."""

    units: list[Unit]
    counts: Counts
    learned: list[Any]  # see `Corpus._learned`
    rejected: list[tuple[int, str]]  # index in the chunk, reason
    kinds: dict[str, int]
    error: UserError | None


@dataclass(frozen=True)
class Pending:
    """The rendered conversations of a record that wait for their batch to be tokenised."""

    record: SourceRecord
    index: int  # in its chunk
    example: Example | Pair
    rendered: list[RenderedText]
    group: int | None

    @property
    def examples(self) -> list[Example]:
        return [self.example.chosen, self.example.rejected] if isinstance(self.example, Pair) else [self.example]


@dataclass
class Corpus:
    """One source and how to make conversations of it. Iterating gives the units that are kept, in the order of the records.

    reject: takes each bad record and its reason; without it the first bad record is a `UserError`.
    index: the source's place among all. kinds: the place of the first record of each kind, in all sources.
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
    kinds: dict[str, str] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    def __iter__(self) -> Iterator[Unit]:
        if self.source.num_bytes >= BYTES_FOR_WORDS:
            self.words = word_encoder(self.template.tokenizer)
        progress = Progress(self.source.num_bytes)
        chunks: deque[Chunk] = deque()  # those in the hands of workers
        try:
            for outcome in in_order(self._outcome, self._chunks(chunks), self.num_workers):
                chunk = chunks.popleft()
                self._add(chunk, outcome)
                yield from outcome.units
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
        units: list[Unit] = []
        kinds: dict[str, int] = {}
        error: UserError | None = None
        try:
            units.extend(part._units(chunk, kinds, rejected if self.reject else None))
        except UserError as stopped:
            error = stopped
        return Outcome(units, part.counts, part._learned(), rejected, kinds, error)

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
        for kind, index in outcome.kinds.items():
            check_kind(kind, str(chunk.records[index].place), self.kinds, self.overlong, self.template.train_on)

    def _units(self, chunk: Chunk, kinds: dict[str, int], rejected: list[tuple[int, str]] | None) -> Iterator[Unit]:
        """The units of a chunk. Bad records go to `rejected`; without it the first one is an error."""
        batch = self._batch(chunk.records, kinds, rejected)
        texts = [text for pending in batch for text in pending.rendered]
        encodings = encode(self.template.tokenizer, texts, self.words)
        for pending in batch:
            index = chunk.first + pending.index
            is_checked = index < CHECK_FIRST or index % CHECK_EVERY == 0
            try:
                unit = _taken(encodings, len(pending.rendered))
                if is_checked:
                    for example, encoded in zip(pending.examples, unit, strict=True):
                        check_against_template(self.template, example, encoded)
                kept = self._kept(pending.example, unit)
            except UserError as error:
                self._refuse(pending.record, pending.index, error, rejected)
                continue
            self._count(pending, unit)
            self.counts.num_kept += bool(kept)
            for part in kept:
                yield part if pending.group is None else tuple(replace(one, group=pending.group) for one in part)

    def _batch(
        self, records: Sequence[SourceRecord], kinds: dict[str, int], rejected: list[tuple[int, str]] | None
    ) -> list[Pending]:
        batch: list[Pending] = []
        for index, record in enumerate(records):
            self.counts.num_read += 1
            try:
                fields = record.fields
                example = self.reader.read(fields)
                kinds.setdefault(PAIR if isinstance(example, Pair) else CONVERSATION, index)
                rendered = self._rendered(example)
                group = group_hash(fields, self.group_key, self.reader.renamed_columns) if self.group_key else None
                batch.append(Pending(record, index, example, rendered, group))
            except UserError as error:
                self._refuse(record, index, error, rejected)
        return batch

    def _rendered(self, example: Example | Pair) -> list[RenderedText]:
        if isinstance(example, Pair):
            return [self._render(example.chosen), self._render(example.rejected)]
        return [self._render(example) if example.messages else self.template.render_text(example.text)]

    def _refuse(self, record: SourceRecord, index: int, error: UserError, rejected: list[tuple[int, str]] | None) -> None:
        """Set a bad record aside, or stop with its file and line."""
        if isinstance(error, CorrectionNeeded):
            raise error.at(str(record.place)) from None
        reason = str(error).removeprefix(f"{record.place}: ")
        if rejected is None:
            raise UserError(f"{record.place}: {reason}") from None
        rejected.append((index, reason))
        self.counts.dropped[BAD_RECORD] += 1

    def _count(self, pending: Pending, unit: Unit) -> None:
        self.counts.lengths.add(unit_length(unit))
        self.counts.num_scored_lower += isinstance(pending.example, Pair) and pending.example.scored_lower
        self.counts.num_without_group += pending.group is None
        self.counts.num_merged_starts += sum(encoded.num_merged_starts for encoded in unit)
        texts = [message["content"] or "" for example in pending.examples for message in example.messages]
        texts += [example.text for example in pending.examples]
        if any(token in text for token in self.template.control_tokens for text in texts):
            self.counts.num_with_control_tokens += 1

    def _kept(self, example: Example | Pair, unit: Unit) -> list[Unit]:
        """The unit, cut or split if that was asked for; nothing if it is dropped."""
        if isinstance(example, Pair):
            check_pair(example, unit, self.template)
        if not all(encoded.num_trained for encoded in unit):
            self.counts.dropped["no turn of it is trained" if len(unit) == 1 else "no turn of a side is trained"] += 1
            return []
        length = unit_length(unit)
        if length > self.seq_length:
            if self.overlong == "error":
                what, ways = ("conversation has", "drop, truncate or split") if len(unit) == 1 else LONG_PAIR
                raise UserError(
                    f"the {what} {length} tokens, more than LENGTH {self.seq_length}: "
                    f"shorten it, give a greater LENGTH, or set OVERLONG={ways}"
                )
            if self.overlong == "split" and isinstance(example, Example):
                return [(part,) for part in self._split(example, unit[0])]
        kept = fitting(unit, self.seq_length, self.overlong, self.counts)
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


def _taken(encodings: Iterator[Conversation], count: int) -> Unit:
    """The next `count` conversations. All of them are taken, also where one is an error."""
    taken: list[Conversation] = []
    errors: list[UserError] = []
    for _ in range(count):
        try:
            taken.append(next(encodings))
        except UserError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return tuple(taken)
