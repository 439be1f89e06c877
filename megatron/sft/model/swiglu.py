"""The gated activation of MLPs: SwiGLU and its kin. And attention's output gate."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.sft.model.recomputation import recompute

# gpt-oss: gates up to this, and up between minus this and this; the sigmoid's slope.
_LIMIT, _SLOPE = 7.0, 1.702


def swiglu(gate_up: Tensor, kind: str = "silu") -> Tensor:
    """activation(gate) * up, [..., width] from [..., 2 * width] with the gate in the first half.

    kind: `silu` (SwiGLU), `gelu_tanh` (GeGLU), or `clamped_silu` as gpt-oss has it: both halves clamped, and up + 1.
    """
    result: Tensor = _SwiGLU.apply(gate_up, kind)
    return result


def gated_mlp(
    mlp: Any, inputs: Tensor, kind: str, again: bool, write: Callable[[Tensor], None] | None = None
) -> tuple[Tensor, Tensor | None]:
    """(output, its bias) of an MLP's `linear_fc1` and `linear_fc2` with the activation of `swiglu` between them.

    again: the activation is freed until the backward pass and made again there, and with `write`, which fills them, the inputs
    too.
    """
    gate_up, inner_bias = mlp.linear_fc1(inputs)
    if write is not None:
        recompute(inputs, gate_up, write)
    if inner_bias is not None:
        gate_up = gate_up + inner_bias
    active = swiglu(gate_up, kind)
    output, outer_bias = mlp.linear_fc2(active)
    if again:
        recompute(active, output, partial(write_swiglu, gate_up.detach(), kind=kind))
    return output, outer_bias


def write_swiglu(gate_up: Tensor, outputs: Tensor, kind: str = "silu") -> None:
    """The same, written into `outputs` without gradient."""
    if gate_up.is_cuda:
        from megatron.sft.kernels import layer

        layer.swiglu(gate_up, outputs, kind)
    else:
        gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
        outputs.copy_(gated(gate, up, kind))


def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """activation(gate) * up in float32, by autograd's own operations."""
    if kind == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    if kind == "clamped_silu":
        gate, up = gate.clamp(max=_LIMIT), up.clamp(-_LIMIT, _LIMIT)
        return gate * (_SLOPE * gate).sigmoid() * (up + 1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, kind: str) -> Tensor:
        gate_up = gate_up.contiguous()
        outputs = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        write_swiglu(gate_up, outputs, kind)
        ctx.save_for_backward(gate_up)
        ctx.kind = kind
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        if gate_up.is_cuda:
            from megatron.sft.kernels.layer import swiglu_backward

            return swiglu_backward(gate_up, gradient, ctx.kind), None
        with torch.enable_grad():
            halves = [half.float().requires_grad_() for half in gate_up.detach().chunk(2, dim=-1)]
            of_halves = torch.autograd.grad(gated(halves[0], halves[1], ctx.kind), halves, gradient.float())
        return torch.cat(of_halves, dim=-1).to(gate_up.dtype), None


def output_gate(context: Tensor, gates: Tensor) -> Tensor:
    """context * sigmoid(gates): context [t, groups * width], gates [t, groups, width], a part of a larger array."""
    result: Tensor = _OutputGate.apply(context.contiguous(), gates)
    return result


class _OutputGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: Tensor, gates: Tensor) -> Tensor:
        ctx.save_for_backward(context, gates)
        if not context.is_cuda:
            return (context.float() * gates.flatten(1).float().sigmoid()).to(context.dtype)
        from megatron.sft.kernels import layer

        outputs = torch.empty_like(context)
        layer.gate(context, gates, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        context, gates = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        if context.is_cuda:
            from megatron.sft.kernels.layer import gate_backward

            return gate_backward(context, gates, gradient)
        share, wide = gates.flatten(1).float().sigmoid(), gradient.float()
        of_gates = wide * context.float() * share * (1 - share)
        return (wide * share).to(context.dtype), of_gates.to(gates.dtype).view(gates.shape)
