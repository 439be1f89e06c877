"""Carries a source through reading, rendering and tokenising, a batch at a time, and counts what becomes of its rows."""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

from megatron.sft.chat.bpe_cache import WordEncoder, word_encoder
from megatron.sft.chat.conversations import Example, RecordReader, group_hash, join_rounds
from megatron.sft.chat.encoding import Conversation, check_against_template, encode
from megatron.sft.chat.template import ChatTemplate, CorrectionNeeded, RenderedText
from megatron.sft.data.mixture import Source
from megatron.sft.data.progress import Progress
from megatron.sft.data.rejected import RejectedRows
from megatron.sft.data.sources import SourceRow
from megatron.sft.data.workers import in_order
from megatron.sft.runtime.errors import UserError

OVERLONG = ("drop", "truncate", "split", "error")
BATCH_BYTES, BATCH_CONVERSATIONS = 1 << 19, 256
BYTES_FOR_WORDS = 4 << 20  # of a source; less is done before a WordEncoder has been tried out
BYTES_OF_OTHER_ROWS = 2000  # about, of rows that are not JSON text
CHECK_FIRST, CHECK_EVERY = 16, 500  # conversations whose tokens are compared with transformers' own
BAD_ROW = "bad row"


@dataclass
class Counts:
    """What became of the rows of a source: num_read = num_kept + the sum of dropped."""

    num_read: int = 0
    num_kept: int = 0
    num_truncated: int = 0
    num_split: int = 0  # rows of which several conversations were made
    num_parts: int = 0  # conversations made of them
    num_parts_dropped: int = 0  # parts of kept rows that are too long or have nothing trained
    num_merged_starts: int = 0  # answers whose first token holds a part of the header, too, and is not trained
    num_with_control_tokens: int = 0  # conversations with the template's own special tokens in their texts
    num_without_group: int = 0  # rows without the field by which rows are grouped
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, others: "Counts") -> None:
        for one in fields(self):
            if one.name == "dropped":
                self.dropped.update(others.dropped)
            else:
                setattr(self, one.name, getattr(self, one.name) + getattr(others, one.name))


@dataclass(frozen=True)
class Chunk:
    """Rows that are worked on together; `first` is the number of the first among all of the source."""

    first: int
    rows: list[SourceRow]


@dataclass(frozen=True)
class Outcome:
    """What became of a chunk: the conversations that are kept, and what is to be added to counts and sets. If there is an
    `error`, the run ends after these conversations."""

    conversations: list[Conversation]
    counts: Counts
    seen: tuple[Counter[str], Counter[str]]  # the reader's formats and ignored fields
    learned: tuple[set[str], set[int], set[str]]  # the template's notes, end-of-turn ids and control tokens
    rejected: list[tuple[int, str]]  # row of the chunk, reason
    error: UserError | None


@dataclass(frozen=True)
class Batched:
    """A conversation that waits for its batch to be tokenised."""

    row: SourceRow
    index: int  # in its chunk
    example: Example
    rendered: RenderedText
    group: int | None


@dataclass
class Corpus:
    """One source, and what to do with its conversations. Iterating gives those that are kept, in the order of the rows.

    Bad rows end it, unless `rejected` is there to take them. `number` is the source's place among several.
    """

    source: Source
    template: ChatTemplate
    reader: RecordReader
    length: int
    overlong: str
    group_key: str = ""
    seed: int = 0
    number: int = 0
    rejected: RejectedRows | None = None
    num_workers: int = 1
    words: WordEncoder | None = None
    counts: Counts = field(default_factory=Counts)

    def __iter__(self) -> Iterator[Conversation]:
        if self.source.num_bytes >= BYTES_FOR_WORDS:
            self.words = word_encoder(self.template.tokenizer)
        progress = Progress(max(self.source.num_bytes, 1))
        chunks: deque[Chunk] = deque()  # those that are being worked on
        try:
            for outcome in in_order(self._outcome, self._chunks(chunks), self.num_workers):
                chunk = chunks.popleft()
                self._add(chunk, outcome)
                yield from outcome.conversations
                if outcome.error:
                    raise outcome.error
                progress.update(len(chunk.rows), chunk.rows[-1].end)
        finally:
            progress.close()

    def _chunks(self, chunks: "deque[Chunk]") -> Iterator["Chunk"]:
        """The rows in pieces, for one worker each; they are appended to `chunks`, too."""
        first = num_bytes = 0
        rows: list[SourceRow] = []
        for row in self.source.rows(self.seed, self.number):
            rows.append(row)
            num_bytes += len(row.content) if isinstance(row.content, bytes) else BYTES_OF_OTHER_ROWS
            if num_bytes >= BATCH_BYTES or len(rows) >= BATCH_CONVERSATIONS:
                chunks.append(Chunk(first, rows))
                yield chunks[-1]
                first, num_bytes, rows = first + len(rows), 0, []
        if rows:
            chunks.append(Chunk(first, rows))
            yield chunks[-1]

    def _outcome(self, chunk: Chunk) -> Outcome:
        """What becomes of a chunk. Runs in a worker, with counts of its own."""
        reader = replace(self.reader, formats=Counter(), ignored_fields=Counter())
        rejected: list[tuple[int, str]] = []
        part = replace(self, reader=reader, counts=Counts(), rejected=None)
        conversations: list[Conversation] = []
        error: UserError | None = None
        try:
            conversations.extend(part._conversations(chunk, rejected if self.rejected else None))
        except UserError as stopped:
            error = stopped
        template = self.template
        learned = (template.notes, template.end_of_turn_ids, template.control_tokens)
        seen = (reader.formats, reader.ignored_fields)
        return Outcome(conversations, part.counts, seen, learned, rejected, error)

    def _add(self, chunk: Chunk, outcome: Outcome) -> None:
        self.counts.add(outcome.counts)
        template = self.template
        for mine, others in zip((self.reader.formats, self.reader.ignored_fields), outcome.seen, strict=True):
            mine.update(others)
        template.notes |= outcome.learned[0]
        template.end_of_turn_ids |= outcome.learned[1]
        template.control_tokens |= outcome.learned[2]
        for index, reason in outcome.rejected:
            assert self.rejected is not None
            self.rejected.add(chunk.rows[index], reason)

    def _conversations(self, chunk: Chunk, rejected: list[tuple[int, str]] | None) -> Iterator[Conversation]:
        """The conversations of some rows. Bad rows go to `rejected`; without it the first one is an error."""
        batch = self._batch(chunk.rows, rejected)
        encodings = encode(self.template.tokenizer, [one.rendered for one in batch], self.words)
        for one in batch:
            try:
                encoded = next(encodings)
                number = chunk.first + one.index
                if number < CHECK_FIRST or number % CHECK_EVERY == 0:
                    check_against_template(self.template, one.example, encoded)
                fitting = self._fitting(one, encoded)
            except UserError as error:
                self._refuse(one.row, one.index, error, rejected)
                continue
            self._count(one, encoded)
            self.counts.num_kept += bool(fitting)
            for part in fitting:
                yield replace(part, group=one.group) if one.group is not None else part

    def _batch(self, rows: Sequence[SourceRow], rejected: list[tuple[int, str]] | None) -> list[Batched]:
        batch: list[Batched] = []
        for index, row in enumerate(rows):
            self.counts.num_read += 1
            try:
                batch.append(self._rendered(row, index))
            except UserError as error:
                self._refuse(row, index, error, rejected)
        return batch

    def _rendered(self, row: SourceRow, index: int) -> Batched:
        fields = row.fields
        example = self.reader.example(fields)
        if example.messages:
            rendered = self.template.render(example.messages, example.tools, example.loss_flags)
        else:
            rendered = self.template.render_text(example.text)
        group = group_hash(fields, self.group_key, self.reader.renamed_columns) if self.group_key else None
        return Batched(row, index, example, rendered, group)

    def _refuse(self, row: SourceRow, index: int, error: UserError, rejected: list[tuple[int, str]] | None) -> None:
        """A bad row: put it aside, or stop with its file and line."""
        reason = str(error).removeprefix(f"{row.place}: ")
        if isinstance(error, CorrectionNeeded):
            raise CorrectionNeeded(error.template, f"{row.place}: {error.reason}") from None
        if rejected is None:
            raise UserError(f"{row.place}: {reason}") from None
        rejected.append((index, reason))
        self.counts.dropped[BAD_ROW] += 1

    def _count(self, one: Batched, encoded: Conversation) -> None:
        self.counts.num_without_group += one.group is None
        self.counts.num_merged_starts += encoded.num_merged_starts
        texts = [message["content"] or "" for message in one.example.messages] or [one.example.text]
        if any(token in text for token in self.template.control_tokens for text in texts):
            self.counts.num_with_control_tokens += 1

    def _fitting(self, one: Batched, encoded: Conversation) -> list[Conversation]:
        """The conversation, cut or split if that was asked for; nothing if it is dropped."""
        if not encoded.num_trained:
            self.counts.dropped["no turn of it is trained"] += 1
            return []
        if len(encoded.tokens) <= self.length:
            return [encoded]
        if self.overlong == "error":
            raise UserError(
                f"the conversation has {len(encoded.tokens)} tokens, more than LENGTH {self.length}: "
                "shorten it, give a greater LENGTH, or set OVERLONG=drop, truncate or split"
            )
        if self.overlong == "split":
            return self._split(one.example, encoded)
        if self.overlong == "drop":
            self.counts.dropped[f"longer than {self.length} tokens"] += 1
            return []
        cut = encoded.cut(self.length)
        if not cut.num_trained:
            self.counts.dropped[f"no trained token among the first {self.length}"] += 1
            return []
        self.counts.num_truncated += 1
        return [cut]

    def _split(self, example: Example, encoded: Conversation) -> list[Conversation]:
        """Parts of a conversation, between its turns, that fit; every part repeats the system text and the functions."""
        if not example.messages:
            parts = encoded.pieces(self.length)
            num_dropped = 0
        else:
            flags = self.template.trained_messages(example.messages, example.loss_flags)
            rounds = replace(example, loss_flags=flags).rounds()
            parts, num_dropped = self._parts(rounds)
        if not parts:
            self.counts.dropped[f"longer than {self.length} tokens in every round of question and answer"] += 1
            return []
        self.counts.num_split += 1
        self.counts.num_parts += len(parts)
        self.counts.num_parts_dropped += num_dropped
        return parts

    def _parts(self, rounds: Sequence[Example]) -> tuple[list[Conversation], int]:
        """As few parts as possible from the first round on; and the number of those left out."""
        alone = [len(one.tokens) for one in self._encoded(rounds)]
        # What a round alone repeats of the system text: the length of two rounds says how much.
        pair = next(self._encoded([join_rounds(rounds[:2])])) if len(rounds) > 1 else None
        repeated = max(alone[0] + alone[1] - len(pair.tokens), 0) if pair else 0
        spans, start, total = [], 0, alone[0]
        for index in range(1, len(rounds)):
            total += alone[index] - repeated
            if total > self.length:
                spans.append((start, index))
                start, total = index, alone[index]
        waiting = [*spans, (start, len(rounds))][::-1]
        parts, num_dropped = [], 0
        while waiting:
            start, end = waiting.pop()
            part = next(self._encoded([join_rounds(rounds[start:end])]))
            if len(part.tokens) <= self.length and part.num_trained:
                parts.append(part)
            elif len(part.tokens) > self.length and end - start > 1:
                waiting += [(end - 1, end), (start, end - 1)]
            else:
                num_dropped += 1
        return parts, num_dropped

    def _encoded(self, examples: Sequence[Example]) -> Iterator[Conversation]:
        rendered = [self.template.render(one.messages, one.tools, one.loss_flags) for one in examples]
        return encode(self.template.tokenizer, rendered)
