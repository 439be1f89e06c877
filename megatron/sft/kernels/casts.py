"""Casts to 8 bits on a GPU, as Triton kernels: each row or column is scaled so that its largest value becomes e4m3's."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A tile of `_cast_columns`: as many bytes of a row as memory is read in at once, and of a column as it is written in.
_ROWS, _COLUMNS = 128, 64


@triton.jit
def store_cast(wide, outputs, scales, row, columns, width, LARGEST: tl.constexpr, LEAST: tl.constexpr):  # noqa: N803
    """One row in 8 bits and its scale. wide: float32, 0 beyond the width."""
    largest = tl.maximum(tl.max(tl.abs(wide), axis=0), LEAST)
    tl.store(scales + row, largest / LARGEST)
    tl.store(outputs + row * width + columns, (wide * (LARGEST / largest)).to(tl.float8e4nv), mask=columns < width)


@triton.jit
def _cast_rows(values, outputs, scales, width, LARGEST: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """One row a program, read once."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    wide = tl.load(values + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
    store_cast(wide, outputs, scales, row, columns, width, LARGEST, LEAST)


@triton.jit
def _cast_columns(
    values, outputs, scales, height, width,
    LARGEST: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Some columns of a matrix a program, read twice, the second time mostly from the cache; written transposed."""
    matrix = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    start = matrix * height * width
    largest = tl.full((COLUMNS,), LEAST, tl.float32)
    for first in range(0, height, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < height)[:, None] & inside[None, :]
        wide = tl.load(values + start + rows[:, None] * width + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(wide), axis=0))
    tl.store(scales + matrix * width + columns, largest / LARGEST, mask=inside)
    inverse = LARGEST / largest
    for first in range(0, height, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < height)[:, None] & inside[None, :]
        wide = tl.load(values + start + rows[:, None] * width + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        narrow = (wide * inverse[None, :]).to(tl.float8e4nv)
        tl.store(outputs + start + columns[None, :] * height + rows[:, None], narrow, mask=mask)


def cast_rows(values: Tensor, largest: float, least: float) -> tuple[Tensor, Tensor]:
    """([..., width] e4m3, float32 [...]): each row of values [..., width], contiguous, over its scale.

    largest: of e4m3. least: what a row's largest value counts as at least.
    """
    width = values.shape[-1]
    outputs = torch.empty_like(values, dtype=torch.float8_e4m3fn)
    scales = torch.empty(values.shape[:-1], dtype=torch.float32, device=values.device)
    if values.numel():
        block = triton.next_power_of_2(width)
        _cast_rows[(scales.numel(),)](
            values, outputs, scales, width, LARGEST=largest, LEAST=least, BLOCK=block, num_warps=warps_of_row(block)
        )  # fmt: skip
    return outputs, scales


def warps_of_row(block: int) -> int:
    """For a program that holds a whole row in registers."""
    return 4 if block <= 2048 else 8 if block <= 8192 else 16


def cast_columns(values: Tensor, largest: float, least: float) -> tuple[Tensor, Tensor]:
    """([n, width, height] e4m3, float32 [n, width]): each column of values [n, height, width], contiguous, over its scale."""
    count, height, width = values.shape
    outputs = torch.empty(count, width, height, dtype=torch.float8_e4m3fn, device=values.device)
    scales = torch.empty(count, width, dtype=torch.float32, device=values.device)
    if values.numel():
        _cast_columns[(count, triton.cdiv(width, _COLUMNS))](
            values, outputs, scales, height, width,
            LARGEST=largest, LEAST=least, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=8,
        )  # fmt: skip
    return outputs, scales
