"""What becomes of the records of a source: the units that are made of them, and the counts of what is dropped and cut."""

from collections import Counter
from dataclasses import dataclass, field, fields

import numpy as np

from megatron.sft.chat.encoding import Conversation

LENGTH_LIMITS = (4096, 8192, 16384, 32768)  # usual row lengths, for the report
BAD_RECORD = "bad row"  # as manifests have called it since format 1

# What is packed as one: a conversation, or the chosen and the rejected one of a pair, which are in one row.
Unit = tuple[Conversation, ...]


@dataclass
class Lengths:
    """Tokens of units before any was cut, split or dropped. longer: how many have more than each limit."""

    num_units: int = 0
    total: int = 0
    shortest: int = 0
    longest: int = 0
    longer: Counter[int] = field(default_factory=lambda: Counter(dict.fromkeys(LENGTH_LIMITS, 0)))

    def add(self, length: int) -> None:
        self.shortest = min(self.shortest, length) if self.num_units else length
        self.num_units += 1
        self.total += length
        self.longest = max(self.longest, length)
        for limit in LENGTH_LIMITS:
            if length <= limit:
                break
            self.longer[limit] += 1

    def update(self, others: "Lengths") -> None:
        if others.num_units:
            self.shortest = min(self.shortest, others.shortest) if self.num_units else others.shortest
        self.num_units += others.num_units
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
    num_scored_lower: int = 0  # pairs whose chosen answer has a lower score than the rejected one
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


def unit_length(unit: Unit) -> int:
    """Tokens of all its conversations."""
    return sum(len(conversation.tokens) for conversation in unit)


def fitting(unit: Unit, seq_length: int, overlong: str, counts: Counts) -> Unit:
    """The unit, cut if it is too long and `overlong` is truncate; empty if it is dropped, which is counted."""
    if unit_length(unit) <= seq_length:
        return unit
    if overlong == "drop":
        counts.dropped[f"longer than {seq_length} tokens"] += 1
        return ()
    cut = tuple(conversation.cut(room) for conversation, room in zip(unit, _rooms(unit, seq_length), strict=True))
    if not all(conversation.num_trained for conversation in cut):
        counts.dropped[f"no trained token among the first {seq_length}"] += 1
        return ()
    if len(cut) > 1 and np.array_equal(cut[0].tokens, cut[1].tokens):
        counts.dropped[f"no difference among the first {seq_length} tokens"] += 1
        return ()
    counts.num_truncated += 1
    return cut


def _rooms(unit: Unit, seq_length: int) -> list[int]:
    """The tokens that each conversation may keep. Of a pair each has half of the row, and what the other one does not need."""
    if len(unit) == 1:
        return [seq_length]
    chosen, rejected = (len(conversation.tokens) for conversation in unit)
    half = seq_length // 2
    room = max(seq_length - rejected, seq_length - half) if chosen > half else chosen
    return [room, seq_length - room]
