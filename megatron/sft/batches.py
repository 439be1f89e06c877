"""Micro-batches: packed rows put one after another into the arrays that the model takes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron.sft.data.tokenized import Row
from megatron.sft.loss_head import Targets


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on the device. t is the number of tokens, padding at the end included.

    tokens, positions: [1, t] int64; positions restart in each conversation.
    packed: the conversations' borders, for attention and rotary positions; padding counts as a conversation of its own.
    targets: the trained tokens.
    loss_count: int64 scalar, what the summed loss is to be divided by (trained tokens, or conversations).
    num_tokens: tokens without padding.
    """

    tokens: Tensor
    positions: Tensor
    packed: PackedSeqParams
    targets: Targets
    loss_count: Tensor
    num_tokens: int


def blank_row() -> Row:
    """A row of one token that is not trained, which stands where a batch has no row left."""
    return Row(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=bool), np.ones(1, dtype=np.int64))


def make_micro_batch(
    rows: Sequence[Row], alignment: int, average_over: str, device: torch.device, pad_id: int = 0
) -> MicroBatch:
    """Concatenate rows to a multiple of `alignment` tokens.

    average_over: "token" gives every trained token the weight 1; "conversation" gives every conversation's trained tokens
    the weight 1 together.
    """
    tokens = np.concatenate([row.tokens for row in rows])
    trained = np.concatenate([row.trained for row in rows])
    lengths = np.concatenate([row.conversation_lengths for row in rows])
    num_tokens = len(tokens)
    padding = -num_tokens % alignment
    if padding:
        tokens = np.concatenate([tokens, np.full(padding, pad_id, dtype=tokens.dtype)])
        lengths = np.append(lengths, padding)
    borders = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(len(tokens)) - np.repeat(borders[:-1], lengths)

    targets = np.flatnonzero(trained)
    weights = np.ones(len(targets), dtype=np.float32)
    loss_count = len(targets)
    if average_over == "conversation":
        conversation = np.searchsorted(borders, targets, side="right")
        _, inverse, counts = np.unique(conversation, return_inverse=True, return_counts=True)
        weights = (1.0 / counts[inverse]).astype(np.float32)
        loss_count = len(counts)

    def put(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(dtype).to(device, non_blocking=True)

    cu_seqlens = put(borders, torch.int32)
    longest = int(lengths.max())
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return MicroBatch(
        tokens=put(tokens[None], torch.int64),
        positions=put(positions[None], torch.int64),
        packed=packed,
        # The hidden state before a token predicts it.
        targets=Targets(put(targets - 1, torch.int64), put(tokens[targets], torch.int64), put(weights, torch.float32)),
        loss_count=torch.tensor(loss_count, dtype=torch.int64, device=device),
        num_tokens=num_tokens,
    )
