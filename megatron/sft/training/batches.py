"""Micro-batches: packed rows put one after another into the arrays that the model takes."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron.sft.data.tokenized import Row
from megatron.sft.model.context_parallel import WHOLE, ContextPart, QueryChunks, local_tokens, query_chunks
from megatron.sft.model.cross_entropy import Targets
from megatron.sft.model.inputs import AttentionRuns, MicroBatch, PackedRows


def blank_row() -> Row:
    """A row of one token that is not trained, which stands where a batch has no row left."""
    return Row(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=bool), np.ones(1, dtype=np.int64))


def make_micro_batch(
    rows: Sequence[Row],
    alignment: int,
    average_over: str,
    device: torch.device,
    pad_id: int = 0,
    part: ContextPart = WHOLE,
    num_sources: int = 0,
) -> MicroBatch:
    """Concatenate rows, and take of them what the context-parallel rank `part` holds, a multiple of `alignment` tokens.

    average_over: "token" gives every trained token the weight 1; "conversation" gives every conversation's trained tokens
    the weight 1 together.
    """
    tokens, spots, lengths = _padded(rows, alignment, pad_id, part)
    borders = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(len(tokens)) - np.repeat(borders[:-1], lengths)
    held = local_tokens(lengths, part)  # [t]
    local = np.full(len(tokens), -1)
    local[held] = np.arange(len(held))

    targets = spots[np.concatenate([row.trained for row in rows])]
    weights = np.ones(len(targets), dtype=np.float32)
    counted = np.ones(len(targets), dtype=np.int64)
    if average_over == "conversation":
        conversation = np.searchsorted(borders, targets, side="right")
        _, firsts, inverse, counts = np.unique(conversation, return_index=True, return_inverse=True, return_counts=True)
        weights = (1.0 / counts[inverse]).astype(np.float32)
        # Each conversation counts on the rank that has its first target.
        counted = np.zeros_like(counted)
        counted[firsts] = 1
    predicting = local[targets - 1]  # the hidden state before a token predicts it
    mine = predicting >= 0

    def put(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(dtype).to(device, non_blocking=True)

    return MicroBatch(
        tokens=put(tokens[held][None], torch.int64),
        positions=put(positions[held][None], torch.int64),
        packed=_packed_rows(lengths, put(borders, torch.int32), query_chunks(lengths, part)),
        targets=Targets(
            put(predicting[mine], torch.int64),
            put(tokens[targets[mine]], torch.int64),
            put(weights[mine], torch.float32),
        ),
        loss_count=torch.tensor(int(counted[mine].sum()), dtype=torch.int64, device=device),
        num_tokens=len(spots),
        sum_squared_lengths=sum(int(np.square(row.conversation_lengths).sum()) for row in rows),
        sources=put(_sources_of_targets(rows)[mine], torch.int64) if num_sources else None,
        num_sources=num_sources,
    )


def _sources_of_targets(rows: Sequence[Row]) -> np.ndarray:
    """[trained tokens of the rows] the source of each one's conversation."""
    sources = [np.zeros(len(row.conversation_lengths)) if row.sources is None else row.sources for row in rows]
    parts = [np.repeat(s, row.conversation_lengths)[row.trained] for s, row in zip(sources, rows, strict=True)]
    return np.concatenate(parts)


def _padded(
    rows: Sequence[Row], alignment: int, pad_id: int, part: ContextPart
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All tokens with padding, where in them the rows' tokens stand, and the lengths of conversations with padding.

    Every conversation is padded at its end, where causal attention keeps the padding from all other tokens.
    """
    lengths = np.concatenate([row.conversation_lengths for row in rows])
    padded = -(-lengths // part.multiple) * part.multiple
    shifts = np.cumsum(padded - lengths) - (padded - lengths)
    spots = np.arange(lengths.sum()) + np.repeat(shifts, lengths)
    last = -int(padded.sum()) % math.lcm(part.multiple, part.size * alignment)
    if last:
        padded = np.append(padded, last)
    tokens = np.full(padded.sum(), pad_id, dtype=np.int64)
    tokens[spots] = np.concatenate([row.tokens for row in rows])
    return tokens, spots, padded


def _packed_rows(lengths: np.ndarray, cu_seqlens: Tensor, chunks: QueryChunks) -> PackedRows:
    def borders(run_lengths: np.ndarray) -> Tensor:
        sums = np.concatenate([[0], np.cumsum(run_lengths)])
        return torch.from_numpy(sums).to(torch.int32).to(cu_seqlens.device, non_blocking=True)

    whole = chunks.key_order is None
    runs = AttentionRuns(
        chunks.lengths.tolist(),
        chunks.key_lengths.tolist(),
        cu_seqlens if whole else borders(chunks.lengths),
        cu_seqlens if whole else borders(chunks.key_lengths),
        None
        if chunks.key_order is None
        else torch.from_numpy(chunks.key_order).to(cu_seqlens.device, non_blocking=True),
    )
    longest = int(lengths.max())
    return PackedRows(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        runs=runs,
    )
