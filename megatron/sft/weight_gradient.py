"""Weight gradients added to megatron-core's float32 gradient buffer inside the matrix product, without Apex's kernel."""

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor


def add_product(total: Tensor, gradient: Tensor, inputs: Tensor) -> None:
    """total [outputs, inputs] += gradient^T @ inputs, in total's dtype. gradient: [t, outputs], inputs: [t, inputs]."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), inputs)
    elif gradient.is_cuda:
        torch.addmm(total, gradient.t(), inputs, out_dtype=total.dtype, out=total)
    else:
        total.add_(gradient.t() @ inputs)


class _Products:
    """What megatron-core's linear layers call, by the names of Apex's module."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, gradient: Tensor, total: Tensor) -> None:
        add_product(total, gradient.flatten(0, -2), inputs.flatten(0, -2))

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def use_in_linear_layers() -> None:
    """Have megatron-core's own linear layers, where their configuration asks for fused accumulation, add by `add_product`."""
    layers.fused_weight_gradient_mlp_cuda = _Products
    layers._grad_accum_fusion_available = True
