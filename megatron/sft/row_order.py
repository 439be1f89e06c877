"""Which rows are trained in which order: a seeded shuffle an epoch, so that a position is a number and nothing else."""

from dataclasses import dataclass, field

import numpy as np

_VALIDATION, _EPOCH = 0, 1


@dataclass
class RowOrder:
    """An endless sequence of row numbers: all of `rows` once an epoch, each epoch in another order.

    rows: [n] int64, the numbers to shuffle. The order depends on the seed, the epoch and n only.
    """

    rows: np.ndarray
    seed: int
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def at(self, position: int) -> int:
        """The row number at `position`, the count of rows consumed before it."""
        epoch, place = divmod(position, len(self.rows))
        if epoch not in self._epochs:
            generator = np.random.default_rng([self.seed, _EPOCH, epoch])
            # A global batch can reach into the next epoch, so two are kept.
            self._epochs = {e: order for e, order in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = self.rows[generator.permutation(len(self.rows))]
        return int(self._epochs[epoch][place])


def split_rows(num_rows: int, training: float, validation: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers for training and for validation: [n] and [m] int64, disjoint, chosen by the seed.

    training and validation are shares of 1. A share above 0 gets a row at least. What neither takes is left out.
    """
    order = np.random.default_rng([seed, _VALIDATION]).permutation(num_rows)
    num_validation = min(max(1, round(num_rows * validation)), num_rows - 1) if validation > 0 else 0
    num_training = min(max(1, round(num_rows * training)), num_rows - num_validation)
    return np.sort(order[num_validation : num_validation + num_training]), np.sort(order[:num_validation])
