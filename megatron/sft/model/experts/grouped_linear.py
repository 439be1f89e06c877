"""Linear layers of several experts as one product over rows that are sorted by expert."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.sft.model.experts.casts import Cast, WeightCasts, cast_rows, product
from megatron.sft.runtime import ranks


class GroupedLinear(nn.Module):
    """The same linear layer of this process's experts. weight: [experts, outputs, inputs]; bias: [experts, outputs] or None.

    is_first_microbatch: megatron-core sets it at the first micro-batch of a step, as it does for Transformer Engine's layers:
    the weights may have changed.
    """

    def __init__(
        self, num_experts: int, outputs: int, inputs: int, dtype: torch.dtype, bias: bool = False, in_8_bits: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, outputs, dtype=dtype)) if bias else None
        self.in_8_bits, self.is_first_microbatch = in_8_bits, True
        self._casts: WeightCasts | None = None

    def forward(self, rows: Tensor, ends: Tensor, cast: Cast | None = None) -> tuple[Tensor, Tensor | None]:
        """rows [n, inputs] sorted by expert, to (their products [n, outputs], the bias, which is not added).

        ends: int32 [experts], the rows up to and with each expert's. cast: the rows in 8 bits, where they are at hand.
        """
        casts = self._present_casts() if self.in_8_bits else None
        return grouped_product(rows, self.weight, ends, casts, cast), self.bias

    def _present_casts(self) -> WeightCasts:
        """Of the weights as they are in this step; of frozen ones they last."""
        if self._casts is None or (self.is_first_microbatch and self.weight.requires_grad):
            self._casts = None  # its memory serves the next
            self._casts = WeightCasts(self.weight)
        self.is_first_microbatch = False
        return self._casts


def grouped_product(
    rows: Tensor, weights: Tensor, ends: Tensor, casts: WeightCasts | None = None, cast: Cast | None = None
) -> Tensor:
    """[n, outputs]: each row [n, inputs] times its expert's matrix, transposed; weights [experts, outputs, inputs].

    casts: of the weights, for products in 8 bits of results and of the gradient of the rows. The gradient of the weights is
    computed in 16 bits: in 8 it would need both factors cast along the rows, and every expert's rows padded to 16. cast: of the
    rows.
    """
    result: Tensor = _GroupedProduct.apply(rows, weights, ends, casts, cast)
    return result


@cache
def _has_grouped_mm(device: torch.device) -> bool:
    """Whether torch computes all experts in one product: in bfloat16, on Hopper and later."""
    suits = hasattr(F, "grouped_mm") and torch.cuda.get_device_capability(device) >= (9, 0)
    if not suits:
        ranks.print_rank_0(
            f"experts are computed one after another: {torch.cuda.get_device_name(device)} with torch {torch.__version__} "
            "has no grouped product (in bfloat16 Hopper and later have)"
        )
    return suits


def _in_one(rows: Tensor) -> bool:
    # torch's product refuses a gradient of no rows, as a process of expert parallelism may have.
    return len(rows) > 0 and rows.is_cuda and rows.dtype == torch.bfloat16 and _has_grouped_mm(rows.device)


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, ends: Tensor, casts: WeightCasts | None, cast: Cast | None) -> Tensor:
        # Frozen weights need no inputs.
        ctx.save_for_backward(rows if weights.requires_grad else None, weights, ends)
        ctx.casts = casts
        if casts is None:
            return _times(rows, weights.transpose(1, 2), ends)
        return _times_in_8_bits(cast or cast_rows(rows), casts.by_output, ends, rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, ends = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_rows = None
        if ctx.needs_input_grad[0] and ctx.casts is None:
            of_rows = _times(gradient, weights, ends)
        elif ctx.needs_input_grad[0]:
            of_rows = _times_in_8_bits(cast_rows(gradient), ctx.casts.by_input, ends, gradient.dtype)
        of_weights = _outer(gradient, rows, ends) if ctx.needs_input_grad[1] else None
        return of_rows, of_weights, None, None, None


def _times_in_8_bits(rows: Cast, matrices: Cast, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, k] in `dtype`: each row [n, m] times its expert's matrix, transposed, matrices [experts, k, m]."""
    if not rows.values.is_cuda:
        return _times(rows.restored(), matrices.restored().transpose(1, 2), ends).to(dtype)
    if not len(rows.values):
        return torch.empty(0, matrices.values.shape[1], dtype=dtype, device=rows.values.device)
    return product(rows, matrices, ends)


def _times(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """[n, k]: each row [n, m] times its expert's matrix, matrices [experts, m, k]."""
    if _in_one(rows):
        return F.grouped_mm(rows, matrices, offs=ends)
    result = rows.new_empty(len(rows), matrices.shape[2])
    for matrix, part, into in zip(matrices, *_split(ends, rows, result), strict=True):
        torch.matmul(part, matrix, out=into)
    return result


def _outer(gradient: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """[experts, outputs, inputs]: gradient^T @ rows of each expert's rows."""
    if _in_one(rows):
        return F.grouped_mm(gradient.t(), rows, offs=ends)
    return torch.stack([of.t() @ part for of, part in zip(*_split(ends, gradient, rows), strict=True)])


def sums_by_expert(rows: Tensor, ends: Tensor) -> Tensor:
    """[experts, width]: the sum of each expert's rows [n, width]."""
    # As a product with as many ones as the grouped product can take.
    ones = rows.new_ones(len(rows), 16)
    return _outer(rows, ones, ends)[:, :, 0]


def _split(ends: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each expert's rows of each tensor. Waits for the device, if there is one."""
    stops = ends.tolist()
    counts = [stop - start for start, stop in zip([0, *stops], stops, strict=False)]
    return [tensor.split(counts) for tensor in tensors]
