"""Tokens and the rows that experts compute: a row for each token and expert that it goes to, sorted by expert.

Nothing here waits for the device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.sft.model.experts.casts import LARGEST, LEAST, Cast, cast_rows
from megatron.sft.model.experts.grouped_linear import sums_by_expert
from megatron.sft.model.swiglu import gated


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


def gather_rows(hidden: Tensor, rows: RoutedRows, written: bool = True) -> Tensor:
    """[n, width]: each row's token of hidden [t, width]; their memory alone if not written."""
    result: Tensor = _Gather.apply(hidden, rows, written)
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


@dataclass(frozen=True)
class ExpertBias:
    """A bias of each expert, and the rows that it is added to.

    values: [experts, width]. experts: int32 [n], each row's. ends: int32 [experts], the rows up to and with each expert's.
    """

    values: Tensor
    experts: Tensor
    ends: Tensor


def expert_bias(values: Tensor, ends: Tensor, num_rows: int) -> ExpertBias:
    """values [experts, width] for rows that are sorted by expert."""
    places = torch.arange(num_rows, device=ends.device, dtype=ends.dtype)
    return ExpertBias(values, torch.searchsorted(ends, places, right=True, out_int32=True), ends)


def weighted_swiglu(gate_up: Tensor, weights: Tensor, kind: str = "silu", bias: ExpertBias | None = None) -> Tensor:
    """activation(gate) * up * weight of each row: [n, width] of gate_up [n, 2 * width] and weights [n] in float32.

    kind: as in `swiglu`. bias: added to gate_up first.
    """
    values = None if bias is None else bias.values
    result: Tensor = _WeightedSwiGLU.apply(gate_up, weights, values, kind, bias)
    return result


def weighted_swiglu_and_cast(
    gate_up: Tensor, weights: Tensor, kind: str, bias: ExpertBias | None, written: bool
) -> tuple[Tensor, Cast]:
    """The same, and in 8 bits. written: if not, the first is its memory alone."""
    values = None if bias is None else bias.values
    active, cast, scales = _WeightedSwiGLU.apply(gate_up, weights, values, kind, bias, True, written)
    return active, Cast(cast, scales)


def write_weighted_swiglu(
    gate_up: Tensor, weights: Tensor, outputs: Tensor, kind: str = "silu", bias: ExpertBias | None = None
) -> None:
    """The same, written into `outputs` without gradient."""
    if gate_up.is_cuda:
        from megatron.sft.kernels import experts

        place = None if bias is None else (bias.values.detach(), bias.experts)
        experts.weighted_swiglu(gate_up, weights, outputs, kind, place)
        return
    gate, up = _halves(gate_up, bias)
    outputs.copy_(gated(gate, up, kind) * weights[:, None])


def _halves(gate_up: Tensor, bias: ExpertBias | None) -> tuple[Tensor, Tensor]:
    """Gate and up in float32, with their bias."""
    wide = gate_up.float()
    if bias is not None:
        wide = wide + bias.values.detach().float()[bias.experts]
    gate, up = wide.chunk(2, dim=-1)
    return gate, up


def _summed(rows: Tensor, places: Tensor) -> Tensor:
    if rows.is_cuda:
        from megatron.sft.kernels.experts import sum_rows

        return sum_rows(rows.contiguous(), places)
    return rows[places].float().sum(dim=1).to(rows.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: RoutedRows, written: bool) -> Tensor:
        ctx.rows = rows
        if not written:
            return hidden.new_empty(len(rows.tokens), hidden.shape[1])
        return hidden.index_select(0, rows.tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _summed(gradients[0], ctx.rows.places), None, None


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
    def forward(
        ctx: Any,
        gate_up: Tensor,
        weights: Tensor,
        values: Tensor | None,
        kind: str,
        bias: ExpertBias | None,
        in_8_bits: bool = False,
        written: bool = True,
    ) -> Tensor | tuple[Tensor, ...]:
        """values: the bias's, for their gradient. in_8_bits: the values and scales of a cast are given as well."""
        outputs = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        ctx.save_for_backward(gate_up, weights)
        ctx.kind, ctx.bias = kind, bias
        if not in_8_bits:
            write_weighted_swiglu(gate_up, weights, outputs, kind, bias)
            return outputs
        cast = _cast_weighted_swiglu(gate_up, weights, outputs, kind, bias, written)
        ctx.mark_non_differentiable(cast.values, cast.scales)
        ctx.set_materialize_grads(False)
        return outputs, cast.values, cast.scales

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, weights = ctx.saved_tensors
        bias: ExpertBias | None = ctx.bias
        of_gate_up, of_weights = _weighted_swiglu_backward(gate_up, weights, gradients[0].contiguous(), ctx.kind, bias)
        of_bias = None if bias is None or not ctx.needs_input_grad[2] else sums_by_expert(of_gate_up, bias.ends)
        return of_gate_up, of_weights, of_bias, None, None, None, None


def _cast_weighted_swiglu(
    gate_up: Tensor, weights: Tensor, outputs: Tensor, kind: str, bias: ExpertBias | None, written: bool
) -> Cast:
    """In 8 bits; and into `outputs`, if they are to be written."""
    if gate_up.is_cuda:
        from megatron.sft.kernels import experts

        place = None if bias is None else (bias.values.detach(), bias.experts)
        into = outputs if written else None
        return Cast(*experts.cast_weighted_swiglu(gate_up, weights, into, kind, place, LARGEST, LEAST))
    filled = outputs if written else torch.empty_like(outputs)
    write_weighted_swiglu(gate_up, weights, filled, kind, bias)
    return cast_rows(filled)


def _weighted_swiglu_backward(
    gate_up: Tensor, weights: Tensor, gradient: Tensor, kind: str, bias: ExpertBias | None
) -> tuple[Tensor, Tensor]:
    """The gradients of gate_up and of the weights."""
    if gate_up.is_cuda:
        from megatron.sft.kernels.experts import weighted_swiglu_backward

        place = None if bias is None else (bias.values.detach(), bias.experts)
        return weighted_swiglu_backward(gate_up, weights, gradient, kind, place)
    with torch.enable_grad():
        halves = [half.requires_grad_() for half in _halves(gate_up, bias)]
        active = gated(halves[0], halves[1], kind)
        of_halves = torch.autograd.grad(active, halves, gradient.float() * weights[:, None])
    return torch.cat(of_halves, dim=-1).to(gate_up.dtype), (gradient.float() * active.detach()).sum(dim=-1)
