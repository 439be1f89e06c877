"""What the model takes: a micro-batch of packed rows as arrays on the device."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron.sft.model.cross_entropy import Targets


@dataclass(frozen=True)
class AttentionRuns:
    """`QueryChunks` as attention kernels take them. Lengths are host numbers, so that no layer waits for the device.

    cu_seqlens, key_cu_seqlens: int32 [runs + 1], 0 and the running sum of lengths, key_lengths. key_order: see `QueryChunks`.
    """

    lengths: list[int]
    key_lengths: list[int]
    cu_seqlens: Tensor
    key_cu_seqlens: Tensor
    key_order: Tensor | None

    @cached_property
    def host_cu_seqlens(self) -> Tensor:
        """`cu_seqlens` as int64 on the host; the same tensor every time, which kernels' caches go by."""
        return torch.tensor([0, *accumulate(self.lengths)])


@dataclass
class PackedRows(PackedSeqParams):
    """Where a micro-batch's conversations begin, over all context-parallel ranks, and what this rank's tokens attend to.

    token_lengths: [t] int64, the length of each token's conversation without padding, on the host: for rotations that depend
    on it. real: [t] bool, False for padding and for rows that only fill a batch; None where all are real.
    balance_scale: float32 scalar, what a layer's loss of uneven experts is multiplied by; None without this loss.
    """

    runs: AttentionRuns | None = None
    token_lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    real: Tensor | None = None
    balance_scale: Tensor | None = None


@dataclass(frozen=True)
class Pairs:
    """The answers in a micro-batch of pairs: of pair p the chosen one is number 2p, the rejected one 2p + 1. a is their number.

    answers: [n] int64, the answer of each target; targets are in the order of the answers.
    places: [n] int64, where each target stands among its answer's trained tokens.
    num_targets: [a] int64, how many of this rank's targets each answer has.
    num_trained: [a] float64, the same over all context-parallel ranks.
    reference: [n] float32, the reference's log-probability of each target; None without a reference.
    """

    answers: Tensor
    places: Tensor
    num_targets: Tensor
    num_trained: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on the device. t is the number of tokens on this context-parallel rank, padding included.

    tokens, position_ids: [1, t] int64; position_ids restart at 0 in each conversation.
    packed: the conversations' cu_seqlens; padding after a conversation belongs to it, padding after the row is a run itself.
    targets: the trained tokens whose predicting hidden state is on this rank.
    loss_count: int64 scalar, what the summed loss is to be divided by (trained tokens, conversations, or pairs), this rank's
    part.
    num_tokens, sum_squared_lengths: of the conversations of all ranks without padding.
    is_blank: its rows only fill the batch.
    gradient_scale: float32 scalar, what the gradient of the summed loss is to be multiplied by; None is 1.
    sources: [n] int64, which of the data's `num_sources` sources each target is from; None where there is one only.
    pairs: where the conversations are pairs.
    weigh: for a loss that is not a sum over tokens: of every target's -log p, [n], the weight of each, [n] float32, with which
    the weighted sum has the loss's gradient, and what is reported of the loss, float64 [any].
    """

    tokens: Tensor
    position_ids: Tensor
    packed: PackedRows
    targets: Targets
    loss_count: Tensor
    num_tokens: int
    sum_squared_lengths: int
    is_blank: bool = False
    gradient_scale: Tensor | None = None
    sources: Tensor | None = None
    num_sources: int = 0
    pairs: Pairs | None = None
    weigh: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
