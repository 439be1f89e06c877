"""RMS norm, alone or together with the addition of the residual before it."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight (or 1 + weight), computed in float32; made as megatron-core makes norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.centered = config.layernorm_zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        weight: Any = self.weight
        # megatron-core sums the gradients of parameters marked this way over TP.
        weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden size] to the same."""
        return add_and_norm(hidden, None, self.weight, self.eps, self.centered)[1]


class ResidualNorm(RMSNorm):
    """The norm before a sub-layer, which also gives the sum that the sub-layer's output will be added to."""

    def forward(self, residual: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(residual + added, its norm), each of residual's shape."""
        return add_and_norm(residual, added, self.weight, self.eps, self.centered)

    def write(self, sums: Tensor, outputs: Tensor) -> None:
        """Fill `outputs` with the norm of `sums`, without gradient."""
        with torch.no_grad():
            _norm(sums, None, self.weight, self.eps, outputs, self.centered)


class ResidualSum(torch.nn.Module):
    """Stands where `ResidualNorm` does in models that norm the outputs of sub-layers only: it adds, and norms nothing."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()

    def forward(self, residual: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(residual + added, the same)."""
        sums = residual if added is None else residual + added
        return sums, sums


class ProjectionNorm(torch.nn.Module):
    """RMS norm over all heads of a token, which are split over tensor-parallel ranks, as its weight is."""

    def __init__(self, config: TransformerConfig, head_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.eps, self.width = eps, num_heads * head_dim
        size = self.width // parallel_state.get_tensor_model_parallel_world_size()
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, heads: Tensor) -> Tensor:
        """[t, heads of this rank, head_dim] to the same."""
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() == 1:
            return add_and_norm(heads.flatten(1), None, self.weight, self.eps)[1].view(heads.shape)
        values = heads.flatten(1).float()
        squares = reduce_from_tensor_model_parallel_region(values.pow(2).sum(dim=-1, keepdim=True), group=group)
        # Every rank has a gradient of the sum, through its own heads: they are added up.
        squares = copy_to_tensor_model_parallel_region(squares, group=group)
        normed = values * torch.rsqrt(squares / self.width + self.eps) * self.weight.float()
        return normed.to(heads.dtype).view(heads.shape)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """megatron-core's description of the weight: split over tensor-parallel ranks."""
        state = self.state_dict(prefix="", keep_vars=True)
        group = parallel_state.get_tensor_model_parallel_group()
        data_parallel = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]
        return make_sharded_tensors_for_checkpoint(
            state, prefix, {"weight": 0}, sharded_offsets, tp_group=group, dp_cp_group=data_parallel
        )


def add_and_norm(
    residual: Tensor, added: Tensor | None, weight: Tensor, eps: float, centered: bool = False
) -> tuple[Tensor, Tensor]:
    """(residual + added, the sum's RMS norm times weight); sums are rounded to residual's dtype before the norm.

    centered: times 1 + weight.
    """
    result: tuple[Tensor, Tensor] = _AddAndNorm.apply(residual, added, weight, eps, centered)
    return result


def _norm(
    residual: Tensor, added: Tensor | None, weight: Tensor, eps: float, outputs: Tensor, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(the sum, `outputs` filled with its norm, 1 / rms of the sum in float32)."""
    if residual.is_cuda:
        from megatron.sft.kernels import layer

        sums, inverse_rms = layer.norm(residual, added, weight, eps, outputs, centered)
        return sums, outputs, inverse_rms
    sums = residual if added is None else residual + added
    values = sums.float()
    inverse_rms = torch.rsqrt(values.pow(2).mean(dim=-1, keepdim=True) + eps)
    outputs.copy_(values * inverse_rms * _scale(weight, centered))
    return sums, outputs, inverse_rms


def _scale(weight: Tensor, centered: bool) -> Tensor:
    return weight.float() + 1 if centered else weight.float()


class _AddAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, added: Tensor | None, weight: Tensor, eps: float, centered: bool
    ) -> tuple[Tensor, Tensor]:
        residual, added = residual.contiguous(), None if added is None else added.contiguous()
        sums, outputs, inverse_rms = _norm(residual, added, weight, eps, residual.new_empty(residual.shape), centered)
        ctx.save_for_backward(sums, weight, inverse_rms)
        ctx.has_added, ctx.centered = added is not None, centered
        ctx.set_materialize_grads(False)
        return sums, outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_sums, grad_outputs = gradients
        frozen = not ctx.needs_input_grad[2]
        sums, weight, inverse_rms = ctx.saved_tensors
        if grad_outputs is None:
            return grad_sums, grad_sums if ctx.has_added else None, None, None, None
        if sums.is_cuda:
            from megatron.sft.kernels.layer import norm_backward

            grad_sums = None if grad_sums is None else grad_sums.contiguous()
            grad_inputs, grad_weight = norm_backward(
                sums, weight, inverse_rms, grad_outputs.contiguous(), grad_sums, ctx.centered
            )
        else:
            normed, scaled = sums.float() * inverse_rms, grad_outputs.float() * _scale(weight, ctx.centered)
            through = inverse_rms * (scaled - normed * (scaled * normed).mean(dim=-1, keepdim=True))
            grad_inputs = (through if grad_sums is None else through + grad_sums.float()).to(sums.dtype)
            grad_weight = (grad_outputs.float() * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)
        return grad_inputs, grad_inputs if ctx.has_added else None, None if frozen else grad_weight, None, None
