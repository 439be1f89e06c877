"""Which rows are trained in which order: a seeded shuffle per epoch, so that a position is a number and nothing else.

The rows of a row group (see data/packing.py) are shuffled as one, and are in one global batch where they fit.
"""

from dataclasses import dataclass, field

import numpy as np

_VALIDATION, _EPOCH = 0, 1


@dataclass
class RowOrder:
    """An endless sequence of row indices: all of `rows` once an epoch, each epoch in another order.

    rows: [n] int64, the indices to shuffle. The order depends on the seed, the epoch and n alone; where there are row groups of
    several rows, also on these and the batch size.
    continues_group: [n] bool, True: the row is in one row group with the one before it in `rows`. None: every row is alone.
    batch_size: rows in a global batch; batches start at the positions that it divides.
    """

    rows: np.ndarray
    seed: int
    continues_group: np.ndarray | None = None
    batch_size: int = 1
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def row_at(self, position: int) -> int:
        """The index of the row at `position`, which is the number of rows consumed before it."""
        epoch, place = divmod(position, len(self.rows))
        if epoch not in self._epochs:
            # A global batch can reach into the next epoch, so two are kept.
            self._epochs = {e: order for e, order in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = self.rows[self._shuffled(epoch)]
        return int(self._epochs[epoch][place])

    def _shuffled(self, epoch: int) -> np.ndarray:
        """The order of one epoch: [n] int64, indices into `rows`."""
        generator = np.random.default_rng([self.seed, _EPOCH, epoch])
        num_rows = len(self.rows)
        if self.continues_group is None or not self.continues_group.any():
            return generator.permutation(num_rows)
        groups = np.cumsum(~self.continues_group) - 1
        sizes = np.bincount(groups)
        first_start = -epoch * num_rows % self.batch_size  # of a batch, in this epoch
        batch_sizes = np.diff(np.unique([0, *range(first_start, num_rows, self.batch_size), num_rows]))
        rank = generator.permutation(len(sizes))  # of each row group in a plain shuffle
        return np.lexsort((np.arange(num_rows), rank[groups], _batch_of_rows(groups, sizes, rank, batch_sizes)))


def num_split_groups(order: RowOrder) -> int:
    """The number of row groups whose rows are not all in one global batch of the first epoch."""
    if order.continues_group is None:
        return 0
    places = np.empty(len(order.rows), dtype=np.int64)
    places[order._shuffled(0)] = np.arange(len(order.rows))
    batches = places // order.batch_size
    groups = np.cumsum(~order.continues_group) - 1
    split = groups[1:][(groups[1:] == groups[:-1]) & (batches[1:] != batches[:-1])]
    return len(np.unique(split))


def split_rows(
    num_rows: int, training: float, validation: float, seed: int, continues_group: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Row indices for training and for validation: [n] and [m] int64, sorted, disjoint, chosen by the seed.

    training and validation are shares of 1. A share above 0 gets at least one row. Rows that neither takes are not used.
    Where `continues_group` ([num_rows] bool) makes row groups of several rows, the shares are of groups, and none is split.
    """
    if continues_group is not None and continues_group.any():
        groups = np.cumsum(~continues_group) - 1
        chosen = split_rows(int(groups[-1]) + 1, training, validation, seed)
        return np.flatnonzero(np.isin(groups, chosen[0])), np.flatnonzero(np.isin(groups, chosen[1]))
    order = np.random.default_rng([seed, _VALIDATION]).permutation(num_rows)
    num_validation = min(max(1, round(num_rows * validation)), num_rows - 1) if validation > 0 else 0
    num_training = min(max(1, round(num_rows * training)), num_rows - num_validation)
    return np.sort(order[num_validation : num_validation + num_training]), np.sort(order[:num_validation])


def _batch_of_rows(groups: np.ndarray, sizes: np.ndarray, rank: np.ndarray, batch_sizes: np.ndarray) -> np.ndarray:
    """The batch of each row: [n] int64. groups: [n], the row group of each row; sizes and rank: of each row group.

    Row groups of several rows go first, the largest before the others, each into the batch that a plain shuffle gives it or the
    nearest with room; the other rows fill what is left, in the shuffle's order. A row group without a batch that has room for
    all of it is filled in row by row, into consecutive batches.
    """
    order = np.argsort(rank)
    natural = np.empty(len(sizes), dtype=np.int64)  # batch of each row group in the plain shuffle
    natural[order] = np.searchsorted(np.cumsum(batch_sizes), np.cumsum(sizes[order]) - sizes[order], side="right")
    room = batch_sizes.tolist()
    num_with_room = np.bincount(room).tolist()  # batches with exactly 0, 1, … rows of room
    batch_of_group = np.full(len(sizes), -1, dtype=np.int64)
    several = order[sizes[order] > 1]
    for group in several[np.argsort(-sizes[several], kind="stable")].tolist():
        size = int(sizes[group])
        if any(num_with_room[size:]):
            batch = _nearest_with_room(room, int(natural[group]), size)
            num_with_room[room[batch]] -= 1
            room[batch] -= size
            num_with_room[room[batch]] += 1
            batch_of_group[group] = batch
    batches = batch_of_group[groups]
    left = np.flatnonzero(batches < 0)
    left = left[np.argsort(rank[groups[left]], kind="stable")]
    batches[left] = np.repeat(np.arange(len(room)), room)
    return batches


def _nearest_with_room(room: list[int], start: int, size: int) -> int:
    """The batch nearest to `start` that has room for `size` rows; there must be one."""
    distances = (sign * distance for distance in range(len(room)) for sign in (1, -1))
    return next(start + d for d in distances if 0 <= start + d < len(room) and room[start + d] >= size)
