"""Context parallelism: rows shared between processes hold every token once and train as they do in one process."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.sft.data.tokenized import Row
from megatron.sft.model.context_parallel import ContextPart, local_tokens, query_chunks
from megatron.sft.model.inputs import MicroBatch
from megatron.sft.training.batches import blank_row, make_micro_batch

CPU = torch.device("cpu")


def test_ranks_hold_the_chunks_that_transformer_engine_expects() -> None:
    """The example in the documentation of Transformer Engine's attn_forward_func_with_cp: sequences of 8 and 4, two ranks."""
    lengths = np.array([8, 4])
    assert local_tokens(lengths, ContextPart(0, 2)).tolist() == [0, 1, 6, 7, 8, 11]
    assert local_tokens(lengths, ContextPart(1, 2)).tolist() == [2, 3, 4, 5, 9, 10]


@given(size=st.integers(2, 5), multiples=st.lists(st.integers(1, 6), min_size=1, max_size=6), rank_seed=st.integers(0, 99))
def test_every_query_sees_its_conversation_up_to_itself(size: int, multiples: list[int], rank_seed: int) -> None:
    part = ContextPart(rank_seed % size, size)
    lengths = np.array(multiples) * part.multiple
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)  # of each token's conversation
    held = local_tokens(lengths, part)
    chunks = query_chunks(lengths, part)
    assert chunks.key_order is not None
    gathered = np.concatenate([local_tokens(lengths, ContextPart(rank, size)) for rank in range(size)])
    assert sorted(gathered.tolist()) == list(range(lengths.sum()))
    queries = np.split(held, np.cumsum(chunks.lengths)[:-1])
    keys = np.split(gathered[chunks.key_order], np.cumsum(chunks.key_lengths)[:-1])
    for query, key in zip(queries, keys, strict=True):
        # Causal, and aligned at the end: the last query sees all keys, each one before it one less.
        for back, token in enumerate(query[::-1]):
            assert key[: len(key) - back].tolist() == list(range(starts[token], token + 1))


def random_row(lengths: list[int], number: int) -> Row:
    """No token comes twice, in this row or another."""
    trained = np.random.default_rng(number).random(sum(lengths)) < 0.6
    trained[np.cumsum([0, *lengths[:-1]])] = False
    return Row(1000 * (number + 1) + np.arange(sum(lengths)), trained, np.array(lengths))


def targets_of(batch: MicroBatch) -> list[tuple[int, int, float]]:
    """(predicting token, token to predict, weight) of each target."""
    predicting = batch.tokens[0, batch.targets.hidden_indices]
    return list(zip(predicting.tolist(), batch.targets.ids.tolist(), batch.targets.weights.tolist(), strict=True))


@given(
    rows=st.lists(st.lists(st.integers(1, 19), min_size=1, max_size=5), min_size=1, max_size=3),
    size=st.integers(2, 4),
    alignment=st.sampled_from([1, 3, 8]),
    average=st.sampled_from(["token", "conversation"]),
)
def test_ranks_together_train_on_what_one_process_trains_on(
    rows: list[list[int]], size: int, alignment: int, average: str
) -> None:
    """Conversations of a single token and those shorter than the chunks among them."""
    made = [random_row(lengths, number) for number, lengths in enumerate(rows)]
    whole = make_micro_batch(made, 1, average, CPU)
    parts = [make_micro_batch(made, alignment, average, CPU, part=ContextPart(rank, size)) for rank in range(size)]
    assert sorted(target for part in parts for target in targets_of(part)) == sorted(targets_of(whole))
    assert sum(int(part.loss_count) for part in parts) == int(whole.loss_count)
    for part in parts:
        assert part.num_tokens == whole.num_tokens
        assert part.tokens.shape[1] % alignment == 0 and part.tokens.shape == parts[0].tokens.shape
        assert torch.equal(part.packed.cu_seqlens_q, parts[0].packed.cu_seqlens_q)
        assert int(part.packed.cu_seqlens_q[-1]) == size * part.tokens.shape[1]
        assert not (part.packed.cu_seqlens_q % (2 * size)).any()


def test_a_blank_row_is_shared_too() -> None:
    parts = [make_micro_batch([blank_row()], 4, "token", CPU, part=ContextPart(rank, 2)) for rank in range(2)]
    assert [part.tokens.shape for part in parts] == [(1, 4), (1, 4)]
    assert [part.num_tokens for part in parts] == [1, 1]
    assert [len(part.targets.ids) for part in parts] == [0, 0]
