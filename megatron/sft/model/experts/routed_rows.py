"""Tokens and the rows that experts compute: a row for each token and expert that it goes to, sorted by expert.

Nothing here waits for the device.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RoutedRows:
    """Where rows come from and where their results go. n = t * chosen.

    tokens: [n], the token of each row. places: [t, chosen], the rows of each token. order: [n], the place of each row in the
    flattened [t, chosen]. ends: int32 [experts], the number of rows up to and with each expert's.
    """

    tokens: Tensor
    places: Tensor
    order: Tensor
    ends: Tensor


def routed_rows(chosen: Tensor, num_experts: int) -> RoutedRows:
    """The rows of tokens that go to the experts `chosen`, [t, k] int64."""
    experts, order = torch.sort(chosen.flatten(), stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return RoutedRows(
        torch.div(order, chosen.shape[1], rounding_mode="floor"), places.view_as(chosen), order, ends_of(experts, num_experts)
    )


def ends_of(sorted_experts: Tensor, num_experts: int) -> Tensor:
    """int32 [experts]: the number of rows up to and with each expert's. sorted_experts: [n], the expert of each row."""
    experts = torch.arange(num_experts, device=sorted_experts.device)
    return torch.searchsorted(sorted_experts, experts, right=True).to(torch.int32)


def gather_rows(hidden: Tensor, rows: RoutedRows) -> Tensor:
    """[n, width]: each row's token of hidden [t, width]."""
    result: Tensor = _Gather.apply(hidden, rows)
    return result


def write_rows(hidden: Tensor, rows: RoutedRows, outputs: Tensor) -> None:
    """The same, written into `outputs` without gradient."""
    torch.index_select(hidden, 0, rows.tokens, out=outputs)


def combine_rows(results: Tensor, rows: RoutedRows) -> Tensor:
    """[t, width]: each token's sum of results [n, width]."""
    result: Tensor = _Combine.apply(results, rows)
    return result


def permuted(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """rows[order], whose backward pass is a permutation too. inverse: of `order`."""
    result: Tensor = _Permute.apply(rows, order, inverse)
    return result


def weighted_swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    """silu(gate) * up * weight of each row: [n, width] of gate_up [n, 2 * width] and weights [n] in float32."""
    result: Tensor = _WeightedSwiGLU.apply(gate_up, weights)
    return result


def write_weighted_swiglu(gate_up: Tensor, weights: Tensor, outputs: Tensor) -> None:
    """The same, written into `outputs` without gradient."""
    if gate_up.is_cuda:
        from megatron.sft.kernels import experts

        experts.weighted_swiglu(gate_up, weights, outputs)
        return
    gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
    outputs.copy_(F.silu(gate) * up * weights[:, None])


def _summed(rows: Tensor, places: Tensor) -> Tensor:
    if rows.is_cuda:
        from megatron.sft.kernels.experts import sum_rows

        return sum_rows(rows.contiguous(), places)
    return rows[places].float().sum(dim=1).to(rows.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: RoutedRows) -> Tensor:
        ctx.rows = rows
        return hidden.index_select(0, rows.tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _summed(gradients[0], ctx.rows.places), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, results: Tensor, rows: RoutedRows) -> Tensor:
        ctx.rows = rows
        return _summed(results, rows.places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0].index_select(0, ctx.rows.tokens), None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse), None, None


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor) -> Tensor:
        outputs = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        write_weighted_swiglu(gate_up, weights, outputs)
        ctx.save_for_backward(gate_up, weights)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        gate_up, weights = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        if gate_up.is_cuda:
            from megatron.sft.kernels.experts import weighted_swiglu_backward

            return weighted_swiglu_backward(gate_up, weights, gradient)
        gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
        share, scaled = gate.sigmoid(), gradient.float() * weights[:, None]
        of_weights = (gradient.float() * gate * share * up).sum(dim=-1)
        of_gate = scaled * up * share * (1 + gate * (1 - share))
        return torch.cat([of_gate, scaled * gate * share], dim=-1).to(gate_up.dtype), of_weights
