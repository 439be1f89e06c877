"""Weight gradients added to megatron-core's float32 gradient buffer inside the matrix product, without Apex's kernel."""

from typing import Any

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


def added_gradient(weight: Tensor) -> Tensor:
    """What a backward pass returns for a weight whose gradient it has added to `main_grad`; marks the weight accordingly.

    megatron-core expects a tensor here and discards it unread: this one is a view of `main_grad` and takes no memory.
    """
    marked: Any = weight
    marked.grad_added_to_main_grad = True
    # With tied embeddings megatron-core would add the returned tensor anyway, expecting zeros.
    marked.zero_out_wgrad = False
    size = weight.numel() * weight.element_size()
    unread: Tensor = marked.main_grad.flatten().view(torch.uint8)[:size].view(weight.dtype).view(weight.shape)
    return unread


class _Products:
    """The functions of Apex's module that megatron-core's linear layers call."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, gradient: Tensor, total: Tensor) -> None:
        add_product(total, gradient.flatten(0, -2), inputs.flatten(0, -2))

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def use_in_linear_layers() -> None:
    """Make megatron-core's own linear layers use `add_product` where their configuration asks for fused accumulation.

    Replaces two names of megatron.core.tensor_parallel.layers (docs/seams.md).
    """
    layers.fused_weight_gradient_mlp_cuda = _Products
    layers._grad_accum_fusion_available = True
