"""Packed rows of random tokens, with given conversation lengths, in memory, for measuring steps."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron.sft.data.packing import pack_rows
from megatron.sft.data.row_order import RowOrder
from megatron.sft.data.tokenized import Row
from megatron.sft.planning.options import TrainOptions


@dataclass(frozen=True)
class RowCounts:
    """Of one row, without padding. squared: the sum of the squared conversation lengths, for the operations of attention.
    pairs: of two conversations each, in rows of pairs."""

    tokens: int
    trained: int
    squared: int
    pairs: int = 0


class BenchmarkRows:
    """The part of `TokenizedRows` that the feeder uses."""

    num_sources = 1
    num_pairs = 0

    def __init__(self, rows: list[Row], counts: list[RowCounts], length: int) -> None:
        self.rows, self.counts, self.manifest = rows, counts, {"length": length}
        self.continues_group = np.zeros(len(rows), dtype=bool)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def used(self, first_step: int, num_steps: int, rows_a_step: int) -> list[int]:
        """Indices of the rows that these steps take, in the feeder's order."""
        order = RowOrder(np.arange(len(self)), TrainOptions.seed, self.continues_group, rows_a_step)
        return [order.row_at(i) for i in range(first_step * rows_a_step, (first_step + num_steps) * rows_a_step)]


def make_rows(
    length: int, conversations: str | list[int], trained: float, vocabulary: int, num_rows: int, padded: bool = False
) -> BenchmarkRows:
    """Rows of random tokens, the same in every call. conversations: lengths in every row ("5200,4100" or a list), or
    "lognormal:MEAN". trained: the share of each conversation's tokens that is trained, at its end.

    padded: one conversation a row, filled up to `length` with tokens that are attended to but not trained, as in Megatron-LM's
    data sets for fine-tuning.
    """
    generator = np.random.default_rng(0)
    if isinstance(conversations, str) and conversations.startswith("lognormal:"):
        mean, sigma = float(conversations.partition(":")[2]), 0.7
        sizes = generator.lognormal(np.log(mean) - sigma**2 / 2, sigma, num_rows * int(length / mean + 1))
        sizes = np.clip(sizes, 16, length).astype(np.int64)
        rows = [[int(n)] for n in sizes] if padded else _packed(sizes, length)
        rows = rows[:num_rows]
    else:
        given = [int(n) for n in conversations.split(",")] if isinstance(conversations, str) else conversations
        rows = [given] * num_rows if not padded else [[n] for _ in range(num_rows) for n in given][:num_rows]
    made = [_row(sizes, length, trained, vocabulary, generator, padded) for sizes in rows]
    return BenchmarkRows([row for row, _ in made], [counts for _, counts in made], length)


def _packed(sizes: np.ndarray, length: int) -> list[list[int]]:
    packing = pack_rows(sizes, length, seed=0)
    return [sizes[packing.conversations[a:b]].tolist() for a, b in pairwise(packing.starts)]


def _row(
    sizes: list[int], length: int, trained: float, vocabulary: int, generator: np.random.Generator, padded: bool
) -> tuple[Row, RowCounts]:
    marks = [np.arange(size) >= max(1, size - int(size * trained)) for size in sizes]
    counts = RowCounts(sum(sizes), int(sum(mark.sum() for mark in marks)), sum(size * size for size in sizes))
    if padded:
        marks.append(np.zeros(length - sum(sizes), dtype=bool))
        sizes = [length]
    mask = np.concatenate(marks)
    return Row(generator.integers(0, vocabulary, len(mask)), mask, np.array(sizes)), counts
