"""The router of a mixture of experts: which experts a token goes to, and with which weights."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron.sft.families.architecture import MoEConfig
from megatron.sft.model.experts.balance import Balance
from megatron.sft.model.inputs import PackedRows


class Router(nn.Module):
    """Chooses each token's experts and their weights, in float32. weight: [experts, hidden size].

    expert_bias: [experts] float32 in any model, the correction bias; a buffer, which training leaves as it is.
    """

    def __init__(self, config: TransformerConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.moe, self.config = moe, config
        self.balance = Balance(config, moe.num_experts)
        self.weight = self._parameter(config, moe.num_experts, config.hidden_size)
        self.bias = self._parameter(config, moe.num_experts) if moe.router_bias else None
        self.expert_bias: Tensor | None
        self.register_buffer("expert_bias", torch.zeros(moe.num_experts) if moe.correction_bias else None)

    def _parameter(self, config: TransformerConfig, *shape: int) -> nn.Parameter:
        parameter: Any = nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
        # Each tensor-parallel rank routes its part of the tokens; megatron-core sums the gradients.
        parameter.sequence_parallel = config.sequence_parallel
        return parameter

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves and casts of the whole model, which must not round the correction bias."""
        super()._apply(fn, recurse)
        if self.expert_bias is not None:
            self.expert_bias = self.expert_bias.float()
        return self

    def forward(self, hidden: Tensor, packed: PackedRows) -> tuple[Tensor, Tensor]:
        """hidden [t, hidden size] to (weights [t, chosen] float32, experts [t, chosen] int64)."""
        logits: Tensor = _Logits.apply(hidden, self.weight)
        if self.bias is not None:
            logits = logits + self.bias.float()
        weights, experts = routed(logits, self.expert_bias, self.moe)
        if not (self.training and torch.is_grad_enabled()):
            return weights, experts
        real, scores = packed.real, None
        if real is not None and self.config.sequence_parallel:
            real = real.chunk(parallel_state.get_tensor_model_parallel_world_size())[
                parallel_state.get_tensor_model_parallel_rank()
            ]
        if packed.balance_scale is not None:
            scores = scores_of(logits, self.moe)
            scores = scores / scores.sum(dim=-1, keepdim=True) if self.moe.scores == "sigmoid" else scores
        return self.balance.weigh(weights, scores, experts, real, packed.balance_scale), experts


def routed(logits: Tensor, correction: Tensor | None, moe: MoEConfig) -> tuple[Tensor, Tensor]:
    """(weights [t, chosen], experts [t, chosen] int64) of logits [t, experts] in float32."""
    simple = correction is None and moe.num_groups == 1
    if simple and moe.scores == "softmax" and moe.normalized:
        values, experts = logits.topk(moe.experts_per_token, dim=-1)
        weights = values.softmax(dim=-1)  # sums to 1
    else:
        scores = scores_of(logits, moe)
        with torch.no_grad():
            ranked = scores if correction is None else scores + correction
            ranked = ranked if moe.num_groups == 1 else _in_best_groups(ranked, moe)
            experts = ranked.topk(moe.experts_per_token, dim=-1).indices
        weights = scores.gather(1, experts)
        if moe.normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=moe.least_sum)
    return (weights if moe.scale == 1.0 else weights * moe.scale), experts


def scores_of(logits: Tensor, moe: MoEConfig) -> Tensor:
    """[t, experts] of logits in the same form."""
    return logits.sigmoid() if moe.scores == "sigmoid" else logits.softmax(dim=-1)


def _in_best_groups(ranked: Tensor, moe: MoEConfig) -> Tensor:
    """Scores [t, experts], minus infinity outside each token's best groups."""
    groups = ranked.unflatten(1, (moe.num_groups, -1))  # [t, groups, experts of a group]
    best = groups.topk(2, dim=-1).values.sum(dim=-1) if moe.group_score == "two best" else groups.amax(dim=-1)
    chosen = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(moe.chosen_groups, dim=-1).indices, True)
    return groups.masked_fill(~chosen[..., None], float("-inf")).flatten(1)


class _Logits(torch.autograd.Function):
    """hidden @ weight^T in float32, keeping both as they are."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden.float() @ weight.float().t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        gradient = gradients[0]
        of_weight = (gradient.t() @ hidden.float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return (gradient @ weight.float()).to(hidden.dtype), of_weight
