"""Packs conversations into rows of at most seq_length tokens: best fit, longest first. Only the lengths are needed.

Conversations may be in groups (the short and the long answer to one question). A group that fits is in one row. The rows of a
longer group are a *row group*: they follow one another, and training keeps them together. Of preference data a pair is packed
as if it were one conversation (see `of_conversations`).
"""

import bisect
from dataclasses import dataclass

import numpy as np

ALGORITHM = "best-fit-decreasing"


@dataclass(frozen=True)
class Packing:
    """Which conversations are in which row: row r is conversations[starts[r]:starts[r + 1]]."""

    conversations: np.ndarray  # [number of conversations] int64, each index once
    starts: np.ndarray  # [number of rows + 1] int64
    continues_group: np.ndarray  # [number of rows] bool, True: the row is in one row group with the row before it

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1


def pack_rows(lengths: np.ndarray, seq_length: int, seed: int) -> Packing:
    """Best-fit decreasing: longest conversation first, each into the row with the least room that is enough.

    lengths: [conversations], in tokens, each in 1..seq_length. `seed` decides where conversations of equal length go, the order
    within a row and the order of rows.
    """
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= seq_length)
    keys = random_keys(len(lengths), seed)
    row_of, num_rows = _best_fit(lengths, keys, seq_length, [])
    return _ordered(row_of, np.arange(num_rows), keys, seed)


def single_rows(num_conversations: int, seed: int) -> Packing:
    """Every conversation alone in a row, rows in random order."""
    row_of = np.arange(num_conversations, dtype=np.int64)
    return _ordered(row_of, row_of, random_keys(num_conversations, seed), seed)


def pack_groups(lengths: np.ndarray, groups: np.ndarray, seq_length: int, seed: int) -> Packing:
    """`pack_rows` of groups: groups[i] is the group of conversation i, numbered from 0 without gaps.

    Groups longer than a row are packed first, each into separate rows; whole groups then go into the room that is left in
    these and into new rows. So a row group has the rows of one long group at most.
    """
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= seq_length)
    keys = random_keys(len(lengths), seed)
    group_lengths = np.bincount(groups, weights=lengths).astype(np.int64)
    fits = group_lengths <= seq_length
    in_long = np.flatnonzero(~fits[groups])  # conversations
    in_long = in_long[np.lexsort((keys[in_long], -lengths[in_long], groups[in_long]))]
    long_rows, rooms, row_groups = _pack_each(lengths[in_long].tolist(), groups[in_long].tolist(), seq_length)

    row_of = np.empty(len(lengths), dtype=np.int64)
    row_of[in_long] = long_rows
    short_groups = np.flatnonzero(fits)
    group_keys = random_keys(len(group_lengths), seed + 2)[short_groups]
    row_of_group = np.empty(len(group_lengths), dtype=np.int64)
    row_of_group[short_groups], num_rows = _best_fit(group_lengths[short_groups], group_keys, seq_length, rooms)
    in_short = fits[groups]
    row_of[in_short] = row_of_group[groups[in_short]]
    num_row_groups = row_groups[-1] + 1 if row_groups else 0
    new_rows = num_row_groups + np.arange(num_rows - len(row_groups))
    return _ordered(row_of, np.concatenate([row_groups, new_rows]).astype(np.int64), keys, seed)


def single_rows_of_groups(groups: np.ndarray, seed: int) -> Packing:
    """Every conversation alone in a row; the rows of a group follow one another, groups are in random order."""
    row_of = np.arange(len(groups), dtype=np.int64)
    return _ordered(row_of, groups, random_keys(len(groups), seed), seed)


def of_conversations(units: Packing, unit_size: int) -> Packing:
    """The packing of conversations that belongs to one of units, unit i of which are the conversations i * unit_size and the
    following; they stay next to each other and in their order."""
    members = units.conversations[:, None] * unit_size + np.arange(unit_size)  # [units, unit_size]
    return Packing(members.reshape(-1), units.starts * unit_size, units.continues_group)


def random_keys(count: int, seed: int) -> np.ndarray:
    """`count` pseudo-random uint64 by splitmix64, which gives the same values with every version of numpy."""
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(seed * 0xD1342543DE82EF95 % (1 << 64))
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(state ^ (state >> np.uint64(31)))


def _ordered(row_of: np.ndarray, row_groups: np.ndarray, keys: np.ndarray, seed: int) -> Packing:
    """Shuffle the row groups, and the conversations within each row. row_of: [conversations]; row_groups: [rows]."""
    num_rows = len(row_groups)
    num_groups = int(row_groups.max()) + 1 if num_rows else 0
    order = np.lexsort((np.arange(num_rows), random_keys(num_groups, seed + 1)[row_groups]))
    rank = np.empty(num_rows, dtype=np.int64)
    rank[order] = np.arange(num_rows)
    shuffled_row_of = rank[row_of]
    starts = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(shuffled_row_of, minlength=num_rows), out=starts[1:])
    ordered_groups = row_groups[order]
    continues_group = np.zeros(num_rows, dtype=bool)
    continues_group[1:] = ordered_groups[1:] == ordered_groups[:-1]
    return Packing(np.lexsort((keys, shuffled_row_of)).astype(np.int64), starts, continues_group)


def _best_fit(lengths: np.ndarray, keys: np.ndarray, seq_length: int, rooms: list[int]) -> tuple[np.ndarray, int]:
    """The row of each length, and the number of rows. Rows 0 to len(rooms) - 1 exist already and have these rooms."""
    order = np.lexsort((keys, -lengths.astype(np.int64)))
    distinct, counts = np.unique(lengths, return_counts=True)
    row_of_slot, num_rows = _place(distinct[::-1].tolist(), counts[::-1].tolist(), seq_length, rooms)
    row_of = np.empty(len(lengths), dtype=np.int64)
    row_of[order] = row_of_slot
    return row_of, num_rows


def _pack_each(lengths: list[int], groups: list[int], seq_length: int) -> tuple[list[int], list[int], list[int]]:
    """Best fit within each group, whose lengths must fall. Gives the row of each length, and the room and the row group of
    each row."""
    rows: list[int] = []
    rooms: list[int] = []
    row_groups: list[int] = []
    open_rows: list[tuple[int, int]] = []  # (room, row) of the group's rows, sorted
    for index, (length, group) in enumerate(zip(lengths, groups, strict=True)):
        if index == 0 or group != groups[index - 1]:
            open_rows = []
        best = bisect.bisect_left(open_rows, (length, -1))
        if best < len(open_rows):
            room, row = open_rows.pop(best)
        else:
            room, row = seq_length, len(rooms)
            row_groups.append((row_groups[-1] + (not open_rows)) if row_groups else 0)
            rooms.append(room)
        rooms[row] = room - length
        bisect.insort(open_rows, (rooms[row], row))
        rows.append(row)
    return rows, rooms, row_groups


def _place(lengths: list[int], counts: list[int], seq_length: int, given: list[int]) -> tuple[np.ndarray, int]:
    """The row of every conversation, in the order of `lengths` (falling), `counts` of each; and the number of rows, which
    includes those with the rooms `given`.

    All conversations of one length are placed together: rows[room] lists the rows with that much room, and the bits of
    `rooms` say which lists are not empty, so that the least sufficient room is one shift away. A row that took a
    conversation and has room for another of the same length is again the best one, so it takes as many as it can.
    """
    rows: list[list[int]] = [[] for _ in range(seq_length + 1)]
    rooms, num_rows = 0, len(given)
    for row, room in enumerate(given):
        rows[room].append(row)
        rooms |= 1 << room
    placed: list[int] = []
    for length, count in zip(lengths, counts, strict=True):
        while count:
            sufficient = rooms >> length
            room = length + (sufficient & -sufficient).bit_length() - 1 if sufficient else seq_length
            per_row = min(count, room // length)
            wanted = count // per_row
            if sufficient:
                taken = rows[room][-wanted:]
                del rows[room][-wanted:]
                if not rows[room]:
                    rooms &= ~(1 << room)
            else:
                taken = list(range(num_rows, num_rows + wanted))
                num_rows += wanted
            left = room - per_row * length
            if left:
                rows[left].extend(taken)
                rooms |= 1 << left
            placed.extend(taken if per_row == 1 else [row for row in taken for _ in range(per_row)])
            count -= per_row * len(taken)
    return np.array(placed, dtype=np.int64), num_rows
