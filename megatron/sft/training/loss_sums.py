"""Losses as sums over this process's micro-batches, to be averaged over all processes later without waiting for the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.sft.model.inputs import MicroBatch
from megatron.sft.training.preferences import PAIR_SUMS, TOKEN_SUMS, PairObjective


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
        num_sums = len(TOKEN_SUMS) + len(PAIR_SUMS)
        (sft_sum, chosen_tokens, *of_pairs), rest = rest[-num_sums:], rest[:-num_sums]
        metrics = {name: value / max(count, 1.0) for name, value in zip(PAIR_SUMS, of_pairs, strict=True)}
        if self.sft_weight:
            metrics |= {"preference_loss": loss, "sft_loss": sft_sum / max(chosen_tokens, 1.0)}
            loss += self.sft_weight * metrics["sft_loss"]
        return LossMeans(loss, int(tokens), rest, metrics)


def global_counts(batch: MicroBatch) -> Tensor:
    """[2] int64, this rank's part of what a step's losses are divided by: the loss's count, and tokens of chosen answers."""
    chosen = torch.zeros_like(batch.loss_count) if batch.pairs is None else batch.pairs.num_targets[0::2].sum()
    return torch.stack([batch.loss_count, chosen])


def loss_report(batch: MicroBatch, summed_loss: Tensor, token_losses: Tensor, report: Tensor | None) -> Tensor:
    """The `LossSum.values` of one micro-batch; report: what `weigh` of its objective gave."""
    total = summed_loss.detach().double() if report is None else report[0]
    counts = torch.stack([batch.loss_count, torch.full_like(batch.loss_count, len(batch.targets.ids))]).double()
    of_pairs = [] if report is None else [report[1:]]
    return torch.cat([total[None], counts, _by_source(batch, token_losses), *of_pairs])


def summed_reports(reports: Sequence[Tensor], batch: MicroBatch, objective: PairObjective | None) -> LossSum:
    """The sum of a step's reports, of which this process may have none. batch: any of the step's."""
    num_sums = len(TOKEN_SUMS) + len(PAIR_SUMS) if objective else 0
    zero = torch.zeros(3 + 2 * batch.num_sources + num_sums, dtype=torch.float64, device=batch.tokens.device)
    return LossSum(torch.stack([zero, *reports]).sum(dim=0), bool(objective), objective.sft_weight if objective else 0.0)


def _by_source(batch: MicroBatch, token_losses: Tensor) -> Tensor:
    """[2 * sources] float64: summed loss and number of trained tokens, source after source."""
    sums = torch.zeros(batch.num_sources, 2, dtype=torch.float64, device=token_losses.device)
    if batch.sources is not None:
        sums.index_add_(0, batch.sources, torch.stack([token_losses, torch.ones_like(token_losses)], dim=1).double())
    return sums.flatten()
