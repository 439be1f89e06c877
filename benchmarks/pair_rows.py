"""Packed rows of random pairs, whose lengths are drawn from one distribution, in memory, for measuring steps of DPO."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from benchmarks.rows import BenchmarkRows, RowCounts
from megatron.sft.data.packing import pack_rows
from megatron.sft.data.tokenized import Row

SIGMA = 0.7  # of the lengths' logarithms, as in `rows.make_rows`


@dataclass(frozen=True)
class TokenPair:
    """Token ids of a prompt and of its two answers."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of both sides, each with the prompt."""
        return len(self.prompt) + len(self.chosen), len(self.prompt) + len(self.rejected)


class PairRows(BenchmarkRows):
    """Rows of pairs. pairs: of each row. The rows carry a reference's log-probabilities, of a model that guesses."""

    def __init__(self, pairs: list[list[TokenPair]], length: int, vocabulary: int) -> None:
        made = [_row(of_row, vocabulary) for of_row in pairs]
        super().__init__([row for row, _ in made], [counts for _, counts in made], length)
        self.pairs, self.num_pairs = pairs, sum(map(len, pairs))


def make_pair_rows(length: int, means: tuple[int, int], vocabulary: int, num_rows: int) -> PairRows:
    """The same rows in every call. means: tokens of a prompt and of an answer on average; lengths are lognormal."""
    generator = np.random.default_rng(0)
    count = num_rows * int(length / (2 * sum(means)) + 2)
    drawn = [
        generator.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, (count, many)) for mean, many in zip(means, (1, 2), strict=True)
    ]
    sizes = np.clip(np.concatenate(drawn, axis=1), 4, length // 4).astype(np.int64)  # [count, prompt and both answers]
    packing = pack_rows(sizes @ [2, 1, 1], length, seed=0)
    rows = [packing.conversations[a:b].tolist() for a, b in pairwise(packing.starts)][:num_rows]
    pairs = [[TokenPair(*(generator.integers(1, vocabulary, n) for n in sizes[index])) for index in row] for row in rows]
    return PairRows(pairs, length, vocabulary)


def padding_share(pairs: list[TokenPair], batch_size: int) -> float:
    """The share of a padded batch that is padding, where each side of each pair is as long as the batch's longest."""
    batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    real = sum(sum(pair.lengths) for pair in pairs)
    padded = sum(2 * len(batch) * max(max(pair.lengths) for pair in batch) for batch in batches)
    return 1 - real / padded


def _row(pairs: list[TokenPair], vocabulary: int) -> tuple[Row, RowCounts]:
    sides = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    masks = [np.arange(len(prompt) + len(answer)) >= len(prompt) for prompt, answer in sides]
    mask, lengths = np.concatenate(masks), np.array([len(mask) for mask in masks])
    tokens = np.concatenate([part for side in sides for part in side])
    reference = np.full(int(mask.sum()), -np.log(vocabulary), dtype=np.float32)
    counts = RowCounts(len(mask), int(mask.sum()), int(np.square(lengths).sum()), len(pairs))
    return Row(tokens, mask, lengths, reference=reference), counts
