"""Micro-batches: packed rows put one after another into the arrays that the model takes."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron.sft.data.tokenized import Row
from megatron.sft.model.context_parallel import WHOLE, ContextPart, QueryChunks, local_tokens, query_chunks
from megatron.sft.model.cross_entropy import Targets
from megatron.sft.model.inputs import AttentionRuns, MicroBatch, PackedRows, Pairs

# Padding is never attended to and never trained, so any id of the vocabulary will do.
PAD_ID = 0


def blank_row() -> Row:
    """A row of one token that is not trained, used where a batch has no row left."""
    return Row(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=bool), np.ones(1, dtype=np.int64))


def make_micro_batch(
    rows: Sequence[Row],
    alignment: int,
    average_over: str,
    device: torch.device,
    part: ContextPart = WHOLE,
    num_sources: int = 0,
    has_pairs: bool = False,
) -> MicroBatch:
    """Concatenate rows, and take of them what the context-parallel rank `part` holds, a multiple of `alignment` tokens.

    average_over: "token" gives every trained token the weight 1; "conversation" gives every conversation's trained tokens
    the weight 1 together.
    has_pairs: conversations are pairs' chosen and rejected answers in turn; a row without any trained token has none.
    """
    tokens, token_positions, lengths = _padded(rows, alignment, part)
    true_lengths = np.concatenate([row.conversation_lengths for row in rows])
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    position_ids = np.arange(len(tokens)) - np.repeat(cu_seqlens[:-1], lengths)
    rank_tokens = local_tokens(lengths, part)  # [t]
    local_index = np.full(len(tokens), -1)
    local_index[rank_tokens] = np.arange(len(rank_tokens))

    real = np.zeros(len(tokens), dtype=bool)
    real[token_positions] = np.concatenate([np.full(len(row.tokens), row.trained.any()) for row in rows])
    targets = token_positions[np.concatenate([row.trained for row in rows])]  # [n of all ranks]
    weights, counted = _weights(targets, cu_seqlens, average_over)
    hidden_indices = local_index[targets - 1]  # the hidden state before a token predicts it
    is_local = hidden_indices >= 0
    put = partial(_put, device=device)
    pairs, num_counted = None, int(counted[is_local].sum())
    if has_pairs:
        pairs = _pairs(rows, np.searchsorted(cu_seqlens, targets, side="right") - 1, is_local, device)
        # The first context-parallel rank counts them.
        num_counted = len(pairs.num_trained) // 2 if part.rank == 0 else 0
    return MicroBatch(
        tokens=put(tokens[rank_tokens][None], torch.int64),
        position_ids=put(position_ids[rank_tokens][None], torch.int64),
        packed=_packed_rows(
            lengths,
            put(cu_seqlens, torch.int32),
            query_chunks(lengths, part),
            _by_token(true_lengths, lengths)[rank_tokens],
            real[rank_tokens],
        ),
        targets=Targets(
            put(hidden_indices[is_local], torch.int64),
            put(tokens[targets[is_local]], torch.int64),
            put(weights[is_local], torch.float32),
        ),
        loss_count=torch.tensor(num_counted, dtype=torch.int64, device=device),
        num_tokens=len(token_positions),
        is_blank=not real.any(),
        sum_squared_lengths=sum(int(np.square(row.conversation_lengths).sum()) for row in rows),
        sources=put(_sources_of_targets(rows)[is_local], torch.int64) if num_sources else None,
        num_sources=num_sources,
        pairs=pairs,
    )


def _pairs(rows: Sequence[Row], conversations: np.ndarray, is_local: np.ndarray, device: torch.device) -> Pairs:
    """conversations: [n of all ranks], the conversation in the micro-batch of each target. is_local: [n] bool."""
    held = np.concatenate([np.full(len(row.conversation_lengths), row.trained.any()) for row in rows])
    answers = (np.cumsum(held) - 1)[conversations]  # a blank row's conversation does not count
    counts = np.bincount(answers, minlength=int(held.sum()))
    assert len(counts) % 2 == 0, "half a pair"
    places = np.arange(len(answers)) - (np.cumsum(counts) - counts)[answers]
    reference = None
    if all(row.reference is not None for row in rows if row.trained.any()):
        parts = [row.reference for row in rows if row.reference is not None]
        reference = np.concatenate([np.zeros(0, dtype=np.float32), *parts])
    put = partial(_put, device=device)
    return Pairs(
        answers=put(answers[is_local], torch.int64),
        places=put(places[is_local], torch.int64),
        num_targets=put(np.bincount(answers[is_local], minlength=len(counts)), torch.int64),
        num_trained=put(counts, torch.float64),
        reference=None if reference is None else put(reference[is_local], torch.float32),
    )


def _put(array: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype).to(device, non_blocking=True)


def _weights(targets: np.ndarray, cu_seqlens: np.ndarray, average_over: str) -> tuple[np.ndarray, np.ndarray]:
    """Each target's weight in the loss, float32 [n], and what it adds to the count that the loss is divided by, int64 [n]."""
    weights, counted = np.ones(len(targets), dtype=np.float32), np.ones(len(targets), dtype=np.int64)
    if average_over == "conversation":
        conversation = np.searchsorted(cu_seqlens, targets, side="right")
        _, firsts, inverse, counts = np.unique(conversation, return_index=True, return_inverse=True, return_counts=True)
        weights = (1.0 / counts[inverse]).astype(np.float32)
        # Each conversation counts on the rank that has its first target.
        counted = np.zeros_like(counted)
        counted[firsts] = 1
    return weights, counted


def _sources_of_targets(rows: Sequence[Row]) -> np.ndarray:
    """[trained tokens of the rows] the source of each one's conversation."""
    sources = [np.zeros(len(row.conversation_lengths)) if row.sources is None else row.sources for row in rows]
    parts = [np.repeat(s, row.conversation_lengths)[row.trained] for s, row in zip(sources, rows, strict=True)]
    return np.concatenate(parts)


def _padded(rows: Sequence[Row], alignment: int, part: ContextPart) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All tokens with padding, the indices of the rows' tokens among them, and the lengths of conversations with padding.

    Every conversation is padded at its end, where causal attention keeps the padding from all other tokens.
    """
    lengths = np.concatenate([row.conversation_lengths for row in rows])
    padded = -(-lengths // part.multiple) * part.multiple
    shifts = np.cumsum(padded - lengths) - (padded - lengths)
    token_positions = np.arange(lengths.sum()) + np.repeat(shifts, lengths)
    last = -int(padded.sum()) % math.lcm(part.multiple, part.size * alignment)
    if last:
        padded = np.append(padded, last)
    tokens = np.full(padded.sum(), PAD_ID, dtype=np.int64)
    tokens[token_positions] = np.concatenate([row.tokens for row in rows])
    return tokens, token_positions, padded


def _by_token(true_lengths: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[all tokens] the length without padding of each token's conversation; padding after the rows counts as one."""
    return np.repeat(np.append(true_lengths, lengths[len(true_lengths) :]), lengths)


def _packed_rows(
    lengths: np.ndarray, cu_seqlens: Tensor, chunks: QueryChunks, token_lengths: np.ndarray, real: np.ndarray
) -> PackedRows:
    def cumulated(run_lengths: np.ndarray) -> Tensor:
        return _put(np.concatenate([[0], np.cumsum(run_lengths)]), torch.int32, cu_seqlens.device)

    whole = chunks.key_order is None
    runs = AttentionRuns(
        chunks.lengths.tolist(),
        chunks.key_lengths.tolist(),
        cu_seqlens if whole else cumulated(chunks.lengths),
        cu_seqlens if whole else cumulated(chunks.key_lengths),
        None if chunks.key_order is None else _put(chunks.key_order, torch.int64, cu_seqlens.device),
    )
    longest = int(lengths.max())
    return PackedRows(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        runs=runs,
        token_lengths=token_lengths,
        real=None if real.all() else _put(real, torch.bool, cu_seqlens.device),
    )
