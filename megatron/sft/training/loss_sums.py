"""Losses as sums over this process's micro-batches, to be averaged over all processes later without waiting for the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.sft.training.preferences import PAIR_SUMS, TOKEN_SUMS

NUM_PAIR_SUMS = len(TOKEN_SUMS) + len(PAIR_SUMS)


@dataclass(frozen=True)
class LossMeans:
    """Of all processes. source_sums: each source's summed loss per token and trained tokens. pairs: metrics of pairs by their
    names, empty where there are none."""

    loss: float
    trained_tokens: int
    source_sums: list[float]
    pairs: dict[str, float]


@dataclass(frozen=True)
class LossSum:
    """A loss to be averaged: float64 [3 + 2 * sources] on the device, zeros off the last stage.

    Summed loss, its count, trained tokens; then each source's summed loss per token and trained tokens. For pairs (has_pairs)
    follow the sums of TOKEN_SUMS and PAIR_SUMS.
    """

    values: Tensor
    has_pairs: bool = False
    sft_weight: float = 0.0

    def reduce(self) -> tuple[float, int]:
        """Mean loss and the number of trained tokens over all processes. Waits for the device; every rank must call it."""
        means = self.reduced()
        return means.loss, means.trained_tokens

    def reduced(self) -> LossMeans:
        """All means over all processes, in the same way."""
        values = self.values.clone()
        torch.distributed.all_reduce(values)
        return self.means(values.tolist())

    def means(self, sums: Sequence[float]) -> LossMeans:
        """sums: of `values` over all processes."""
        (total, count, tokens), rest = sums[:3], list(sums[3:])
        loss = total / max(count, 1.0)
        if not self.has_pairs:
            return LossMeans(loss, int(tokens), rest, {})
        (sft_sum, chosen_tokens, *of_pairs), rest = rest[-NUM_PAIR_SUMS:], rest[:-NUM_PAIR_SUMS]
        metrics = {name: value / max(count, 1.0) for name, value in zip(PAIR_SUMS, of_pairs, strict=True)}
        if self.sft_weight:
            metrics |= {"preference_loss": loss, "sft_loss": sft_sum / max(chosen_tokens, 1.0)}
            loss += self.sft_weight * metrics["sft_loss"]
        return LossMeans(loss, int(tokens), rest, metrics)
