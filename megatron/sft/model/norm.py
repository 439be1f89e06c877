"""RMS norm, alone or together with the addition of the residual before it."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight, computed in float32; made as megatron-core makes norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        weight: Any = self.weight
        # megatron-core sums the gradients of parameters marked this way over TP.
        weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden size] to the same."""
        return add_and_norm(hidden, None, self.weight, self.eps)[1]


class ResidualNorm(RMSNorm):
    """The norm before a sub-layer, which also gives the sum that the sub-layer's output will be added to."""

    def forward(self, residual: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(residual + added, its norm), each of residual's shape."""
        return add_and_norm(residual, added, self.weight, self.eps)

    def write(self, sums: Tensor, outputs: Tensor) -> None:
        """Fill `outputs` with the norm of `sums`, without gradient."""
        with torch.no_grad():
            _norm(sums, None, self.weight, self.eps, outputs)


def add_and_norm(residual: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(residual + added, the sum's RMS norm times weight); sums are rounded to residual's dtype before the norm."""
    result: tuple[Tensor, Tensor] = _AddAndNorm.apply(residual, added, weight, eps)
    return result


def _norm(residual: Tensor, added: Tensor | None, weight: Tensor, eps: float, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(the sum, `outputs` filled with its norm, 1 / rms of the sum in float32)."""
    if residual.is_cuda:
        from megatron.sft.model.kernels import layer

        sums, inverse_rms = layer.norm(residual, added, weight, eps, outputs)
        return sums, outputs, inverse_rms
    sums = residual if added is None else residual + added
    values = sums.float()
    inverse_rms = torch.rsqrt(values.pow(2).mean(dim=-1, keepdim=True) + eps)
    outputs.copy_(values * inverse_rms * weight.float())
    return sums, outputs, inverse_rms


class _AddAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual, added = residual.contiguous(), None if added is None else added.contiguous()
        sums, outputs, inverse_rms = _norm(residual, added, weight, eps, residual.new_empty(residual.shape))
        ctx.save_for_backward(sums, weight, inverse_rms)
        ctx.has_added = added is not None
        ctx.set_materialize_grads(False)
        return sums, outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_sums, grad_outputs = gradients
        frozen = not ctx.needs_input_grad[2]
        sums, weight, inverse_rms = ctx.saved_tensors
        if grad_outputs is None:
            return grad_sums, grad_sums if ctx.has_added else None, None, None
        if sums.is_cuda:
            from megatron.sft.model.kernels.layer import norm_backward

            grad_inputs, grad_weight = norm_backward(
                sums, weight, inverse_rms, grad_outputs.contiguous(), None if grad_sums is None else grad_sums.contiguous()
            )
        else:
            normed, scaled = sums.float() * inverse_rms, grad_outputs.float() * weight.float()
            through = inverse_rms * (scaled - normed * (scaled * normed).mean(dim=-1, keepdim=True))
            grad_inputs = (through if grad_sums is None else through + grad_sums.float()).to(sums.dtype)
            grad_weight = (grad_outputs.float() * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)
        return grad_inputs, grad_inputs if ctx.has_added else None, None if frozen else grad_weight, None
