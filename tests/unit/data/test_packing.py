"""Packing: nothing lost, doubled or split, full rows, quickly, and the same result for the same seed."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.sft.data.packing import Packing, pack_rows, random_keys, single_rows


def row_sizes(packing: Packing, lengths: np.ndarray) -> list[int]:
    return [
        int(lengths[packing.conversations[start:end]].sum())
        for start, end in zip(packing.starts[:-1], packing.starts[1:], strict=True)
    ]


def best_fit_decreasing(lengths: list[int], row_length: int) -> list[int]:
    """The textbook's algorithm: room left in each row."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(left, row) for row, left in enumerate(room) if left >= length]
        if fitting:
            room[min(fitting)[1]] -= length
        else:
            room.append(row_length - length)
    return room


packing_cases = st.integers(1, 60).flatmap(
    lambda row_length: st.tuples(st.just(row_length), st.lists(st.integers(1, row_length), max_size=80))
)


@given(case=packing_cases, seed=st.integers(0, 1 << 62))
def test_every_conversation_is_in_one_row_and_rows_are_those_of_best_fit_decreasing(
    case: tuple[int, list[int]], seed: int
) -> None:
    row_length, given_lengths = case
    lengths = np.array(given_lengths, dtype=np.int64)
    packing = pack_rows(lengths, row_length, seed)
    assert sorted(packing.conversations.tolist()) == list(range(len(lengths)))
    room = [row_length - size for size in row_sizes(packing, lengths)]
    assert sorted(room) == sorted(best_fit_decreasing(given_lengths, row_length))


def log_normal_lengths(count: int, mean: float, sigma: float, longest: int) -> np.ndarray:
    draw = np.random.default_rng(0).normal(np.log(mean) - sigma**2 / 2, sigma, size=count)
    lengths = np.exp(draw).astype(np.int64).clip(1)
    return lengths[lengths <= longest]


@pytest.mark.parametrize(
    "mean, sigma, least_fill", [(700, 0.6, 0.999), (700, 1.0, 0.999), (5000, 0.6, 0.995), (5000, 1.0, 0.995)]
)
def test_a_million_conversations_pack_tightly_and_fast(mean: float, sigma: float, least_fill: float) -> None:
    lengths = log_normal_lengths(1_000_000, mean, sigma, 16384)
    started = time.process_time()
    pack_rows(lengths[:100_000], 16384, seed=1234)
    tenth = time.process_time() - started
    packing = pack_rows(lengths, 16384, seed=1234)
    seconds = time.process_time() - started - tenth
    assert lengths.sum() / (packing.num_rows * 16384) >= least_fill
    assert np.array_equal(np.bincount(packing.conversations), np.ones(len(lengths)))
    sizes = np.add.reduceat(lengths[packing.conversations], packing.starts[:-1])
    assert sizes.max() <= 16384
    assert seconds <= 50 * tenth  # by the square of the number it would be 100


def test_the_seed_decides_and_nothing_else() -> None:
    lengths = log_normal_lengths(2000, 300, 1.0, 4096)
    one, again, other = (pack_rows(lengths, 4096, seed) for seed in (1, 1, 2))
    assert one.conversations.tobytes() == again.conversations.tobytes()
    assert one.starts.tobytes() == again.starts.tobytes()
    assert one.conversations.tobytes() != other.conversations.tobytes()


def test_the_random_numbers_are_those_of_splitmix64() -> None:
    """First outputs of the published generator started at 0, so that no numpy version changes a packing."""
    assert [int(key) for key in random_keys(3, seed=0)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_rows_are_not_ordered_by_length() -> None:
    lengths = log_normal_lengths(5000, 700, 1.0, 4096)
    packing = pack_rows(lengths, 4096, seed=3)
    longest = np.maximum.reduceat(lengths[packing.conversations], packing.starts[:-1])
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.15


def test_without_packing_every_conversation_has_a_row() -> None:
    packing = single_rows(100, seed=5)
    assert sorted(packing.conversations.tolist()) == list(range(100))
    assert packing.starts.tolist() == list(range(101))
    assert packing.conversations.tolist() != list(range(100))


def test_no_conversation_gives_no_row() -> None:
    assert pack_rows(np.zeros(0, dtype=np.int64), 128, seed=1).num_rows == 0
