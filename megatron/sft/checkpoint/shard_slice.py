"""A slice of a named tensor: what a process holds of a run's state, and the unit that checkpoints are written and read in.

A checkpoint stores tensors in the model's own shapes, whatever the parallel layout. Every process writes its slices, and a run
in another layout reads its slices out of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class ShardSlice:
    """The elements from `offsets` on, `sizes` of them by dimension, of the tensor `key` of shape `whole`.

    `values()` returns them in row-major order, on any device and in any shape. It may be called late and may be slow: writers
    call it when the slice's turn comes, readers to get the memory to fill.
    """

    key: str
    offsets: Sizes
    sizes: Sizes
    whole: Sizes
    dtype: torch.dtype
    values: Callable[[], Tensor]
    # The stored tensor may have another number of rows: the vocabulary is padded for tensor parallelism.
    padded: bool = False

    @property
    def num_bytes(self) -> int:
        return prod(self.sizes) * self.dtype.itemsize


def balanced(sizes: Sequence[int], num_parts: int) -> list[list[int]]:
    """Indices of `sizes` in `num_parts` lists of about equal sums: the largest first, each to the list that has least so far.

    Equal arguments give equal lists on every process.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    sums = [0] * num_parts
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        least = sums.index(min(sums))
        parts[least].append(index)
        sums[least] += sizes[index]
    return parts


def contiguous_blocks(shape: Sizes, start: int, stop: int) -> Iterator[tuple[Sizes, Sizes, int]]:
    """Blocks that together are the elements `start` to `stop` of a flattened row-major tensor of this shape.

    Yields the offsets and sizes of each, and its first element; the elements of a block are contiguous.
    """
    if len(shape) <= 1:
        yield ((start,), (stop - start,), start) if shape else ((), (), start)
        return
    inner = prod(shape[1:])
    row = start // inner
    if start % inner or stop - start < inner:
        end = min(stop, (row + 1) * inner)
        for offsets, sizes, first in contiguous_blocks(shape[1:], start - row * inner, end - row * inner):
            yield (row, *offsets), (1, *sizes), row * inner + first
        if end < stop:
            yield from contiguous_blocks(shape, end, stop)
        return
    rows = (stop - start) // inner
    yield (row, *(0,) * (len(shape) - 1)), (rows, *shape[1:]), start
    if start + rows * inner < stop:
        yield from contiguous_blocks(shape, start + rows * inner, stop)
