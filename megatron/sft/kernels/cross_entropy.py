"""Softmax cross entropy of one chunk of logits on a GPU: two Triton kernels that read the logits three times and write once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _shaped(values, scale, cap, SCALED: tl.constexpr, CAPPED: tl.constexpr):  # noqa: N803
    """The logits as they count: times scale, then cap * tanh(logit / cap); tanh(x) is 2 * sigmoid(2 x) - 1."""
    if SCALED:
        values = values * scale
    if CAPPED:
        values = cap * (2.0 * tl.sigmoid(2.0 * values / cap) - 1.0)
    return values


@triton.jit
def _row_statistics(
    logits, local_ids, statistics, num_columns, stride, scale, cap,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """statistics[row] = (largest logit, sum of exp(logit - largest), target's logit or -inf if it is not here)."""
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * stride
    columns = tl.arange(0, BLOCK)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for first in range(0, num_columns, BLOCK):
        inside = first + columns < num_columns
        values = tl.load(start + first + columns, mask=inside, other=float("-inf")).to(tl.float32)
        if SCALED or CAPPED:
            values = tl.where(inside, _shaped(values, scale, cap, SCALED, CAPPED), float("-inf"))
        new = tl.maximum(largest, tl.max(values, axis=0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(values - new), axis=0)
        largest = new
    target = tl.load(local_ids + row)
    here = (target >= 0) & (target < num_columns)
    wanted = tl.load(start + tl.where(here, target, 0), mask=here, other=float("-inf")).to(tl.float32)
    if SCALED or CAPPED:
        wanted = tl.where(here, _shaped(wanted, scale, cap, SCALED, CAPPED), float("-inf"))
    tl.store(statistics + 3 * row, largest)
    tl.store(statistics + 3 * row + 1, total)
    tl.store(statistics + 3 * row + 2, wanted)


@triton.jit
def _gradient_in_place(
    logits, local_ids, log_sums, weights, num_columns, num_stored, stride, scale, cap,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """logits = weight * (softmax - onehot), zero in the columns from num_columns on, which are padding."""
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * stride
    log_sum, weight = tl.load(log_sums + row), tl.load(weights + row)
    target = tl.load(local_ids + row)
    columns = tl.arange(0, BLOCK)
    for first in range(0, num_stored, BLOCK):
        here = first + columns
        values = tl.load(start + here, mask=here < num_stored, other=0.0).to(tl.float32)
        if SCALED or CAPPED:
            values = _shaped(values, scale, cap, SCALED, CAPPED)
        gradient = weight * (tl.exp(values - log_sum) - tl.where(here == target, 1.0, 0.0))
        if CAPPED:
            gradient *= 1.0 - (values / cap) * (values / cap)
        if SCALED:
            gradient *= scale
        gradient = tl.where(here < num_columns, gradient, 0.0)
        tl.store(start + here, gradient.to(logits.dtype.element_ty), mask=here < num_stored)


def _shape_options(scale: float, cap: float | None) -> dict[str, object]:
    return {"scale": scale, "cap": 1.0 if cap is None else cap, "SCALED": scale != 1.0, "CAPPED": cap is not None}


def row_statistics(logits: Tensor, local_ids: Tensor, num_columns: int, scale: float = 1.0, cap: float | None = None) -> Tensor:
    """[rows, 3] float32: largest logit, sum of exponentials relative to it, the target's logit (-inf if elsewhere).

    Only the first `num_columns` columns count. scale, cap: see `LogitShape`.
    """
    statistics = torch.empty(len(logits), 3, dtype=torch.float32, device=logits.device)
    _row_statistics[(len(logits),)](
        logits, local_ids, statistics, num_columns, logits.stride(0), **_shape_options(scale, cap), BLOCK=_BLOCK, num_warps=8
    )
    return statistics


def gradient_in_place(
    logits: Tensor, local_ids: Tensor, log_sums: Tensor, weights: Tensor, num_columns: int,
    scale: float = 1.0, cap: float | None = None,
) -> None:  # fmt: skip
    """Overwrite logits [rows, columns] by the gradient of sum(weights * losses); log_sums: [rows], weights: [rows]."""
    _gradient_in_place[(len(logits),)](
        logits, local_ids, log_sums, weights, num_columns, logits.shape[1], logits.stride(0), **_shape_options(scale, cap),
        BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
