"""How evenly routers spread the tokens over experts: counted for the log, and a loss of it where one is asked for.

Nothing here waits for the device.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class Balance:
    """Of one router on this process. sums: float64 [experts + 2] since the last `taken`: tokens of each expert, the sum of the
    losses of micro-batches, and the number of these.
    """

    def __init__(self, config: TransformerConfig, num_experts: int) -> None:
        self.config, self.num_experts = config, num_experts
        self.sums: Tensor | None = None

    def taken(self, device: torch.device) -> Tensor:
        """The sums, which start again from 0."""
        sums, self.sums = self.sums, None
        return torch.zeros(self.num_experts + 2, dtype=torch.float64, device=device) if sums is None else sums

    def weigh(
        self, weights: Tensor, scores: Tensor | None, chosen: Tensor, real: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        """The weights [t, k], counted; with a `scale` their backward pass adds the loss's gradient to that of the scores.

        scores: [t, experts] of which each token's sum to 1, needed for the loss. chosen: [t, k], each token's experts.
        real: [t] bool, False for padding, which does not count; None: all are real.
        scale: float32 scalar, what the loss of this micro-batch and layer is multiplied by; None: no loss.
        """
        counts = self._counts(chosen, real)
        loss, share = counts.new_zeros(()), counts.new_zeros(())
        if scale is not None:
            assert scores is not None
            loss, share = self._loss(scores, counts, len(chosen) if real is None else real.sum(), real)
            if self.config.fp16:
                scale = self.config.grad_scale_func(scale)
            weights = _WithLoss.apply(weights, loss, scale)
        sums = torch.cat([counts.double(), loss.detach().double()[None], share.double()[None]])
        self.sums = sums if self.sums is None else self.sums + sums
        return weights

    def _counts(self, chosen: Tensor, real: Tensor | None) -> Tensor:
        """float32 [experts]: the tokens of this process that go to each."""
        marked = chosen if real is None else chosen.masked_fill(~real[:, None], -1)
        # Unlike bincount it does not wait for the largest number. On a GPU it is deterministic for whole numbers, on a CPU it
        # takes no others than floating-point ones.
        numbers = marked.int() if marked.is_cuda else marked.float()
        return torch.histc(numbers, self.num_experts, 0, self.num_experts).float()

    def _loss(self, scores: Tensor, counts: Tensor, num_real: Tensor | int, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """(this process's part of the micro-batch's loss, and of the number 1 that it counts for).

        experts * sum over e of f_e * P_e, f_e the share of the tokens that go to expert e and P_e the mean of its scores (Fedus
        et al., arXiv 2101.03961, equations 4 to 6), as transformers' load_balancing_loss_func has it for one layer: where a
        token goes to several experts, the shares sum to their number. Shares and means are over the tokens of all processes
        that share the micro-batch.
        """
        totals = torch.cat([counts, torch.as_tensor(num_real, dtype=counts.dtype, device=counts.device).reshape(1)])
        group = self._sharing()
        if group is not None:
            torch.distributed.all_reduce(totals, group=group)
        num_tokens = totals[-1].clamp(min=1.0)
        sums = (scores if real is None else scores * real[:, None]).sum(dim=0)
        loss = self.num_experts * (totals[:-1] * sums).sum() / num_tokens.square()
        return loss, (totals[-1] > 0).float() / (1 if group is None else group.size())

    def _sharing(self) -> Any:
        """The group of processes that have other tokens of the same micro-batch, None where there is none."""
        if self.config.sequence_parallel:
            return parallel_state.get_tensor_and_context_parallel_group()
        group = parallel_state.get_context_parallel_group()
        return group if group.size() > 1 else None


class _WithLoss(torch.autograd.Function):
    """Gives its first argument, and in the backward pass the loss the gradient `scale`."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradients[0], scale.to(torch.float32), None


def routers_of(models: Iterable[nn.Module]) -> Iterator[tuple[int, Balance]]:
    """(number of the layer in the whole model, from 0; its router's balance) of these parts of it."""
    for model in models:
        for module in model.modules():
            layer: Any = module
            balance = getattr(getattr(getattr(layer, "mlp", None), "router", None), "balance", None)
            if isinstance(balance, Balance):
                yield layer.layer_number - 1, balance


@dataclass(frozen=True)
class ExpertLoad:
    """The tokens of the most loaded expert over those of the mean expert: the mean over the layers, and the largest.

    worst_layer: of the largest. loss: the mean over micro-batches and layers of `Balance`'s, before its coefficient; None
    without it.
    """

    mean: float
    worst: float
    worst_layer: int
    loss: float | None


def load_of(sums: Tensor) -> ExpertLoad | None:
    """sums: [layers, experts + 2] of all processes, on the CPU, 0 in layers without experts. None without any token."""
    counts, losses, numbers = sums[:, :-2], sums[:, -2], sums[:, -1]
    here = counts.sum(dim=1) > 0
    if not here.any():
        return None
    ratios = torch.where(here, counts.amax(dim=1) / counts.mean(dim=1).clamp(min=1e-9), 0.0)
    with_loss = numbers > 0
    loss = float((losses[with_loss] / numbers[with_loss]).mean()) if with_loss.any() else None
    return ExpertLoad(float(ratios[here].mean()), float(ratios.max()), int(ratios.argmax()), loss)
