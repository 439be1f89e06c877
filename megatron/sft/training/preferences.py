"""Training on pairs: from the log-probabilities of a micro-batch's targets to their weights in the loss, and to its metrics."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron.sft.model.inputs import MicroBatch, Pairs
from megatron.sft.planning.objective_checks import needs_pairs, needs_reference, sft_weight
from megatron.sft.planning.options import TrainOptions
from megatron.sft.training.objectives import (
    DPO_LOSSES,
    REFERENCE_FREE,
    Answers,
    PairLoss,
    divergence_of,
    probability,
    settings_of,
)

# What `weigh` reports after the summed loss of the pairs: sums over the chosen answers' tokens, then over pairs. Names are
# TRL's.
TOKEN_SUMS = ("sft_loss", "chosen_tokens")
PAIR_SUMS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


class PairObjective:
    """The loss of pairs that a run's settings name."""

    def __init__(self, options: TrainOptions) -> None:
        self.has_reference = needs_reference(options.objective)
        self.sft_weight = sft_weight(options)
        self._settings = settings_of(options)
        self._loss = DPO_LOSSES[options.dpo_loss] if self.has_reference else REFERENCE_FREE[options.objective]
        self._divergence = divergence_of(options.dpo_f_divergence, options.dpo_f_alpha)
        self._tail_weight = options.dpo_ld_alpha
        self._has_mean_rewards = options.objective in ("simpo", "orpo")

    @property
    def loss_without_margin(self) -> float:
        """The loss of a pair, without the SFT part, whose answers the model finds as probable as the reference does."""
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        return float(self._pair_loss(Answers(zero, zero, one, one)).value)

    def weigh(self, pairs: Pairs, sft_scale: Tensor | None, token_losses: Tensor) -> tuple[Tensor, Tensor]:
        """`MicroBatch.weigh`: the weights, [n] float32; and this rank's part of the summed loss, TOKEN_SUMS, PAIR_SUMS,
        float64.

        sft_scale: scalar, pairs of the global batch for each trained token of its chosen answers, since everything is divided
        by the number of pairs later. None where no gradient is wanted.
        """
        logps = -token_losses.double()
        factor = self._factor(pairs)
        own = logps if factor is None else logps * factor
        # Token by token, so that what is equal is exactly zero.
        ratios = logps - pairs.reference.double() if pairs.reference is not None else logps
        ratios = ratios if factor is None else ratios * factor
        sums = torch.stack([_sums(own, pairs), _sums(ratios, pairs)])  # [2, answers]
        if parallel_state.get_context_parallel_world_size() > 1:
            torch.distributed.all_reduce(sums, group=parallel_state.get_context_parallel_group())
        lengths = pairs.num_trained.clamp(min=1)
        answers = Answers(sums[1, 0::2], sums[1, 1::2], lengths[0::2], lengths[1::2])
        loss = self._pair_loss(answers)
        slopes = torch.stack([loss.by_chosen, loss.by_rejected], dim=1).flatten()  # [answers]
        weights = -slopes[pairs.answers]
        weights = weights if factor is None else weights * factor
        is_chosen = pairs.answers % 2 == 0
        if sft_scale is not None and self.sft_weight:
            weights = weights + is_chosen * (self.sft_weight * sft_scale)
        chosen = torch.stack([(token_losses.double() * is_chosen).sum(), is_chosen.sum().double()])
        of_pairs = self._pair_sums(loss.value, answers, sums[0] / lengths if self._has_mean_rewards else sums[0])
        # Every context-parallel rank has the same sums over pairs: the first one reports them.
        if parallel_state.get_context_parallel_rank() > 0:
            of_pairs = torch.zeros_like(of_pairs)
        return weights.float(), torch.cat([of_pairs[:1], chosen, of_pairs[1:]])

    def _pair_loss(self, answers: Answers) -> PairLoss:
        (c, by_c), (j, by_j) = self._divergence(answers.c), self._divergence(answers.j)
        loss = self._loss(replace(answers, c=c, j=j), self._settings)
        return PairLoss(loss.value, loss.by_chosen * by_c, loss.by_rejected * by_j)

    def _factor(self, pairs: Pairs) -> Tensor | None:
        """[n] float64: DPO_LD_ALPHA for the tokens past the length of the pair's shorter answer, 1 for the others (Liu 2024,
        arXiv 2409.06411)."""
        if self._tail_weight == 1:
            return None
        shared = torch.minimum(pairs.num_trained[0::2], pairs.num_trained[1::2])
        is_tail = pairs.places >= shared[pairs.answers // 2]
        return 1.0 + (self._tail_weight - 1.0) * is_tail.double()

    def _pair_sums(self, values: Tensor, answers: Answers, logps: Tensor) -> Tensor:
        beta = self._settings.beta
        chosen, rejected = beta * answers.c, beta * answers.j
        if self._has_mean_rewards:
            chosen, rejected = chosen / answers.n, rejected / answers.m
        is_right = (chosen > rejected).double()
        return torch.stack([values, chosen, rejected, is_right, chosen - rejected, logps[0::2], logps[1::2]]).sum(dim=1)


def _sums(values: Tensor, pairs: Pairs) -> Tensor:
    """[answers] float64 sums of [n] values; the same in every run, which `index_add_` on a GPU is not."""
    # With one value and one answer more, neither is ever empty: this rank may hold no target, and a batch no pair.
    one = pairs.num_targets.new_ones(1)
    lengths = torch.cat([pairs.num_targets, one])
    return torch.segment_reduce(torch.cat([values, values.new_zeros(1)]), "sum", lengths=lengths, unsafe=True, initial=0.0)[:-1]


def objective_of(options: TrainOptions) -> PairObjective | None:
    """The objective of pairs, None where the loss is a sum over tokens."""
    return PairObjective(options) if needs_pairs(options.objective) else None


def bound(batch: MicroBatch, options: TrainOptions, objective: PairObjective | None, sft_scale: Tensor | None) -> MicroBatch:
    """The micro-batch with what the head needs to know of the objective."""
    if options.objective == "dft":
        return replace(batch, targets=replace(batch.targets, factor=probability))
    if objective is None or batch.pairs is None:
        return batch
    weigh: Callable[[Tensor], tuple[Tensor, Tensor]] = partial(objective.weigh, batch.pairs, sft_scale)
    return replace(batch, weigh=weigh)
