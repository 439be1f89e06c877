"""SwiGLU: the gated activation of the dense MLP."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, [..., width] from [..., 2 * width] with the gate in the first half."""
    result: Tensor = _SwiGLU.apply(gate_up)
    return result


def write_swiglu(gate_up: Tensor, outputs: Tensor) -> None:
    """The same, written into `outputs` without gradient."""
    if gate_up.is_cuda:
        from megatron.sft.model.kernels import layer

        layer.swiglu(gate_up, outputs)
    else:
        gate, up = gate_up.chunk(2, dim=-1)
        outputs.copy_(F.silu(gate.float()) * up.float())


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        outputs = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        write_swiglu(gate_up, outputs)
        ctx.save_for_backward(gate_up)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        if gate_up.is_cuda:
            from megatron.sft.model.kernels.layer import swiglu_backward

            return swiglu_backward(gate_up, gradient)
        gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
        share = gate.sigmoid()
        of_gate = gradient.float() * up * share * (1 + gate * (1 - share))
        of_up = gradient.float() * gate * share
        return torch.cat([of_gate, of_up], dim=-1).to(gate_up.dtype)
