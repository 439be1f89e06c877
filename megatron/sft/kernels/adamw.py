"""One AdamW step of a parameter on a GPU, in place: a Triton kernel that reads and writes each of its tensors once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def _adamw(
    weights, lower, gradients, exp_avg, exp_avg_sq, num_elements,
    beta1, beta2, eps, decay, step_size, inverse_sqrt_correction, grad_scale, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """weights, lower: bits of bfloat16 and int16; their float32 value is stepped and split again (see training/optimizers)."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < num_elements
    low = tl.load(lower + places, mask=inside, other=0).to(tl.int32)
    high = tl.load(weights + places, mask=inside, other=0).to(tl.int32) - (low < 0).to(tl.int32)
    master = ((high << 16) | (low & 0xFFFF)).to(tl.float32, bitcast=True)
    gradient = tl.load(gradients + places, mask=inside, other=0.0).to(tl.float32) * grad_scale
    first = beta1 * tl.load(exp_avg + places, mask=inside, other=0.0).to(tl.float32) + (1.0 - beta1) * gradient
    second = tl.load(exp_avg_sq + places, mask=inside, other=0.0).to(tl.float32)
    second = beta2 * second + (1.0 - beta2) * gradient * gradient
    master = master * decay - step_size * first / (tl.sqrt(second) * inverse_sqrt_correction + eps)
    tl.store(exp_avg + places, first.to(exp_avg.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq + places, second.to(exp_avg_sq.dtype.element_ty), mask=inside)
    bits = master.to(tl.int32, bitcast=True)
    low = bits.to(tl.int16)
    high = (bits >> 16) + (low < 0).to(tl.int32)
    tl.store(lower + places, low, mask=inside)
    tl.store(weights + places, high.to(tl.int16), mask=inside)


def adamw_step(
    weights: Tensor, lower: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, factors: tuple[float, ...]
) -> None:
    """Step bfloat16 weights with int16 lower halves; all tensors contiguous, of one size. factors: `adamw.Factors`."""
    num_elements = weights.numel()
    _adamw[(triton.cdiv(num_elements, _BLOCK),)](
        weights.view(torch.int16), lower, gradient, exp_avg, exp_avg_sq, num_elements, *factors, BLOCK=_BLOCK, num_warps=4
    )
