"""Packs conversations into rows of at most a given length: best fit, longest first. Only the lengths are needed."""

from dataclasses import dataclass

import numpy as np

ALGORITHM = "best-fit-decreasing"


@dataclass(frozen=True)
class Packing:
    """Which conversations stand in which row: row r is conversations[starts[r]:starts[r + 1]]."""

    conversations: np.ndarray  # [number of conversations] int64, each index once
    starts: np.ndarray  # [number of rows + 1] int64

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1


def pack_rows(lengths: np.ndarray, row_length: int, seed: int) -> Packing:
    """Best-fit decreasing: longest conversation first, each to the row with the least room that is enough.

    `seed` decides which of the conversations of one length goes where, the order within a row and the order of rows.
    Lengths must be in 1..row_length.
    """
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= row_length)
    keys = random_keys(len(lengths), seed)
    order = np.lexsort((keys, -lengths.astype(np.int64)))
    distinct, counts = np.unique(lengths, return_counts=True)
    row_of_slot, num_rows = _place(distinct[::-1].tolist(), counts[::-1].tolist(), row_length)
    row_of = np.empty(len(lengths), dtype=np.int64)
    row_of[order] = row_of_slot
    return _ordered(row_of, num_rows, keys, seed)


def single_rows(num_conversations: int, seed: int) -> Packing:
    """Every conversation alone in a row, rows in random order."""
    keys = random_keys(num_conversations, seed)
    return _ordered(np.arange(num_conversations, dtype=np.int64), num_conversations, keys, seed)


def random_keys(count: int, seed: int) -> np.ndarray:
    """`count` pseudo-random uint64: splitmix64, whose values stay the same whatever the version of numpy."""
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(seed * 0xD1342543DE82EF95 % (1 << 64))
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(state ^ (state >> np.uint64(31)))


def _ordered(row_of: np.ndarray, num_rows: int, keys: np.ndarray, seed: int) -> Packing:
    """Shuffle the rows, and the conversations within each."""
    rank = np.empty(num_rows, dtype=np.int64)
    rank[np.argsort(random_keys(num_rows, seed + 1), kind="stable")] = np.arange(num_rows)
    shuffled_row_of = rank[row_of]
    starts = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(shuffled_row_of, minlength=num_rows), out=starts[1:])
    return Packing(np.lexsort((keys, shuffled_row_of)).astype(np.int64), starts)


def _place(lengths: list[int], counts: list[int], row_length: int) -> tuple[np.ndarray, int]:
    """The row of every conversation, conversations in the order of `lengths` (falling), `counts` of each.

    All conversations of one length are placed together: rows[room] lists the rows with that much room, and the bits of
    `rooms` say which lists are not empty, so that the least sufficient room is one shift away. A row that took a
    conversation and has room for another of the length is again the best one, so it takes as many as it can.
    """
    rows: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms, num_rows = 0, 0
    placed: list[int] = []
    for length, count in zip(lengths, counts, strict=True):
        while count:
            sufficient = rooms >> length
            room = length + (sufficient & -sufficient).bit_length() - 1 if sufficient else row_length
            each = min(count, room // length)
            wanted = count // each
            if sufficient:
                taken = rows[room][-wanted:]
                del rows[room][-wanted:]
                if not rows[room]:
                    rooms &= ~(1 << room)
            else:
                taken = list(range(num_rows, num_rows + wanted))
                num_rows += wanted
            left = room - each * length
            if left:
                rows[left].extend(taken)
                rooms |= 1 << left
            placed.extend(taken if each == 1 else [row for row in taken for _ in range(each)])
            count -= each * len(taken)
    return np.array(placed, dtype=np.int64), num_rows
