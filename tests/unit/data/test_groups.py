"""Groups of conversations: the short and the long answer to one question meet in one row, or in one global batch."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.sft.chat.conversations import group_hash
from megatron.sft.chat.encoding import Conversation
from megatron.sft.data.packing import Packing, pack_groups, pack_rows, single_rows_of_groups
from megatron.sft.data.row_order import RowOrder, num_split_groups, split_rows
from megatron.sft.data.store import ConversationStore
from megatron.sft.data.tokenized import TokenizedRows, token_dtype


def row_of_each(packing: Packing) -> np.ndarray:
    """[conversations]: the row of each conversation."""
    rows = np.empty(len(packing.conversations), dtype=np.int64)
    rows[packing.conversations] = np.repeat(np.arange(packing.num_rows), np.diff(packing.starts))
    return rows


def hybrid_pairs(num_pairs: int, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Short answers of about 500 tokens, long ones of 5,000 in the mean, log-normal: lengths and group numbers."""
    random = np.random.default_rng(3)
    long = np.exp(random.normal(np.log(5000) - sigma**2 / 2, sigma, 2 * num_pairs)).astype(np.int64)
    long = long[(long >= 1) & (long <= 16384)][:num_pairs]
    short = random.normal(500, 150, num_pairs).astype(np.int64).clip(20)
    order = random.permutation(2 * num_pairs)
    return np.concatenate([short, long])[order], np.tile(np.arange(num_pairs), 2)[order]


packing_cases = st.integers(1, 40).flatmap(
    lambda row_length: st.tuples(
        st.just(row_length), st.lists(st.tuples(st.integers(1, row_length), st.integers(0, 12)), min_size=1, max_size=60)
    )
)


@given(case=packing_cases, seed=st.integers(0, 1 << 62))
def test_a_group_that_fits_is_in_one_row_and_any_other_in_one_unit(case: tuple[int, list[tuple[int, int]]], seed: int) -> None:
    row_length, conversations = case
    lengths = np.array([length for length, _ in conversations])
    _, groups = np.unique([group for _, group in conversations], return_inverse=True)
    packing = pack_groups(lengths, groups, row_length, seed)
    assert sorted(packing.conversations.tolist()) == list(range(len(lengths)))
    assert np.add.reduceat(lengths[packing.conversations], packing.starts[:-1]).max() <= row_length
    rows = row_of_each(packing)
    units = np.cumsum(~packing.continues_group)
    for group in range(groups.max() + 1):
        members = groups == group
        assert len(set(units[rows[members]])) == 1
        assert (len(set(rows[members])) == 1) == (lengths[members].sum() <= row_length)
    alone = single_rows_of_groups(groups, seed)
    assert np.array_equal(np.cumsum(~alone.continues_group)[-1], groups.max() + 1)
    assert len(set(zip(groups.tolist(), np.cumsum(~alone.continues_group)[row_of_each(alone)].tolist(), strict=True))) == (
        groups.max() + 1
    )


def test_groups_of_one_are_packed_as_tightly_as_no_groups() -> None:
    lengths = np.random.default_rng(0).integers(1, 4097, 5000)
    grouped = pack_groups(lengths, np.arange(5000), 4096, seed=1)
    assert grouped.num_rows == pack_rows(lengths, 4096, seed=1).num_rows
    assert not grouped.continues_group.any()


@pytest.mark.parametrize("sigma", [0.6, 1.0])
def test_pairs_of_a_hybrid_corpus_fill_their_rows(sigma: float) -> None:
    lengths, groups = hybrid_pairs(50_000, sigma)
    packing = pack_groups(lengths, groups, 16384, seed=1234)
    assert lengths.sum() / (16384 * packing.num_rows) >= 0.99
    assert 0 < packing.continues_group.mean() < 0.05


def write_groups(prefix: Path, lengths: np.ndarray, groups: np.ndarray, row_length: int, packing: bool) -> TokenizedRows:
    """The first token of a conversation is its group's number."""
    with ConversationStore(prefix, token_dtype(100_000), grouped=True) as store:
        for length, group in zip(lengths.tolist(), groups.tolist(), strict=True):
            tokens = np.full(length, group, dtype=np.int64)
            store.add(Conversation(tokens, [1, length - 1], group=group * 0x9E3779B97F4A7C15 % (1 << 64)))
        packed = store.pack(row_length, 7, packing)
        store.write(packed, {"format": 1} | store.totals(packed, row_length))
    return TokenizedRows(prefix)


def batches_of_groups(rows: TokenizedRows, order: RowOrder, batch_size: int, epoch: int) -> dict[int, list[int]]:
    """The global batches in which each group is trained in an epoch, by reading the rows as training does."""
    found: dict[int, list[int]] = {}
    num_rows = len(order.rows)
    for position in range(epoch * num_rows, (epoch + 1) * num_rows):
        row = rows[order.row_at(position)]
        for first in (np.cumsum(row.conversation_lengths) - row.conversation_lengths).tolist():
            found.setdefault(int(row.tokens[first]), []).append(position // batch_size)
    return found


@pytest.mark.parametrize("packing, batch_size", [(True, 8), (True, 13), (False, 8)])
def test_every_pair_meets_in_one_global_batch(tmp_path: Path, packing: bool, batch_size: int) -> None:
    """Pairs of up to two rows, in training order, over three epochs, whose borders are not those of batches."""
    random = np.random.default_rng(5)
    lengths = np.concatenate([random.integers(2, 20, 400), random.integers(2, 101, 400)])
    rows = write_groups(tmp_path / "data", lengths, np.tile(np.arange(400), 2), 100, packing)
    continues_group = rows.continues_group
    assert continues_group.sum() > 10
    training, validation = split_rows(len(rows), 0.9, 0.1, seed=3, continues_group=continues_group)
    assert not set(training) & set(validation)
    order = RowOrder(training, 1234, continues_group[training], batch_size)
    assert num_split_groups(order) == 0
    seen: set[int] = set()
    for epoch in range(3):
        batches = batches_of_groups(rows, order, batch_size, epoch)
        assert all(len(found) == 2 and len(set(found)) == 1 for found in batches.values())
        seen |= batches.keys()
    held_out = {int(token) for number in validation.tolist() for token in rows[number].tokens}
    assert seen | held_out == set(range(400)) and not seen & held_out


def test_every_row_is_trained_once_an_epoch_in_another_order_each(tmp_path: Path) -> None:
    continues_group = np.random.default_rng(1).random(1000) < 0.2
    continues_group[0] = False
    order = RowOrder(np.arange(1000), 5, continues_group, 16)
    epochs = [[order.row_at(1000 * epoch + place) for place in range(1000)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(1000)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = RowOrder(np.arange(1000), 5, continues_group, 16)
    assert [again.row_at(2000 + place) for place in range(1000)] == epochs[2]
    correlation = np.corrcoef(epochs[0], np.arange(1000))[0, 1]
    assert abs(correlation) < 0.15


def test_without_units_of_several_rows_the_order_is_the_plain_shuffle() -> None:
    rows = np.arange(50, 150)
    plain, with_units = RowOrder(rows, 1), RowOrder(rows, 1, np.zeros(100, dtype=bool), 8)
    assert [plain.row_at(i) for i in range(250)] == [with_units.row_at(i) for i in range(250)]


def test_units_that_no_batch_can_hold_are_counted() -> None:
    continues_group = np.array([False, True, True, True, True, False, False, True])
    assert num_split_groups(RowOrder(np.arange(8), 1, continues_group, 4)) == 1
    pairs = np.tile([False, True], 30)
    assert num_split_groups(RowOrder(np.arange(60), 1, pairs, 3)) == 10  # one pair of two in every second batch
    assert num_split_groups(RowOrder(np.arange(60), 1, pairs, 4)) == 0


def test_the_files_say_which_rows_belong_together_and_who_is_in_which_group(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    rows = write_groups(tmp_path / "data", np.array([9, 3, 8, 2, 2]), np.array([0, 1, 0, 1, 2]), 10, packing=True)
    assert rows.continues_group.tolist() in ([False, True, False], [False, False, True])
    assert rows.manifest["row_units"] == {"1": 1, "2": 1}
    assert rows.groups is not None
    first_tokens = [
        int(token) for row in rows for token in row.tokens[np.cumsum(row.conversation_lengths) - row.conversation_lengths]
    ]
    numbers = dict(zip(first_tokens, rows.groups.tolist(), strict=True))
    assert [numbers[token] for token in first_tokens] == rows.groups.tolist() and len(set(numbers.values())) == 3
    plain = IndexedDataset(str(tmp_path / "data"))
    assert sorted(int(token) for segment in range(len(plain)) for token in plain[segment]) == sorted(
        int(token) for row in rows for token in row.tokens
    )


def test_a_group_is_the_value_of_a_field_by_its_old_or_new_name() -> None:
    row = {"problem": "1+1?", "solution": "2", "none": None}
    by_old, by_new = (group_hash(row, key, {"problem": "instruction"}) for key in ("problem", "instruction"))
    assert by_old == by_new == group_hash({"x": "1+1?"}, "x", {}) is not None
    assert group_hash(row, "none", {}) is None and group_hash(row, "missing", {}) is None
    assert group_hash({"x": {"a": 1, "b": 2}}, "x", {}) == group_hash({"x": {"b": 2, "a": 1}}, "x", {})
    assert group_hash({"x": 0}, "x", {}) is not None and group_hash({"x": "1"}, "x", {}) != group_hash({"x": 1}, "x", {})
