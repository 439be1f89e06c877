"""Context parallelism on packed rows: which tokens each rank holds, and which keys its queries see.

Each conversation is cut into 2 x size chunks of one length; rank r holds chunks r and 2 x size - 1 - r of every one, so that
all ranks have the same attention to compute. Transformer Engine and megatron-core expect this order.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ContextPart:
    """The part of a row that one rank holds: number `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def multiple(self) -> int:
        """What the length of every conversation must be a multiple of."""
        return 2 * self.size if self.size > 1 else 1


WHOLE = ContextPart()


@dataclass(frozen=True)
class QueryChunks:
    """Runs of this rank's tokens that follow one another in a conversation, and the keys that each attends to.

    A run sees itself, causally, and all of its conversation before it: its keys end where it ends.

    lengths, key_lengths: tokens of each run and of its keys. Without context parallelism runs are conversations.
    key_order: [sum of key_lengths] int64, where the keys stand after the local tokens of all ranks were put one rank after
    another; None where they are the local tokens as they stand.
    """

    lengths: np.ndarray
    key_lengths: np.ndarray
    key_order: np.ndarray | None = None


def local_tokens(lengths: np.ndarray, part: ContextPart) -> np.ndarray:
    """[tokens / size] int64: where in the row the rank's tokens stand, in the rank's order.

    lengths: of the conversations, multiples of `part.multiple`.
    """
    if part.size == 1:
        return np.arange(lengths.sum())
    chunk = lengths // part.multiple
    starts = np.cumsum(lengths) - lengths
    first, second = starts + part.rank * chunk, starts + (part.multiple - 1 - part.rank) * chunk
    return _ranges(_alternate(first, second), np.repeat(chunk, 2))


def query_chunks(lengths: np.ndarray, part: ContextPart) -> QueryChunks:
    """What the rank's queries attend to; `lengths` as for `local_tokens`."""
    if part.size == 1:
        return QueryChunks(lengths, lengths)
    chunk = lengths // part.multiple
    starts = np.cumsum(lengths) - lengths
    key_lengths = _alternate((part.rank + 1) * chunk, (part.multiple - part.rank) * chunk)
    seen = _ranges(np.repeat(starts, 2), key_lengths)
    held = np.concatenate([local_tokens(lengths, ContextPart(rank, part.size)) for rank in range(part.size)])
    place = np.empty_like(held)
    place[held] = np.arange(len(held))
    return QueryChunks(np.repeat(chunk, 2), key_lengths, place[seen])


def _alternate(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.stack([one, other], axis=1).ravel()


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, … of each range, one range after another."""
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
