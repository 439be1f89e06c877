"""One AdamW step with moments in 8 bits on a GPU, in place: bit for bit what optimizers/adamw_8bit.py computes on a CPU.

The formats are those of checkpoint/moment_codes.py, whose `encode`, `decode` and `random_bits` are repeated here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _BLOCK = 32, 64


@triton.jit
def _random_bits(places, seed):
    mixed = places.to(tl.uint32) ^ seed.to(tl.uint32)
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
    mixed = (mixed ^ (mixed >> 15)) * 0x846CA68B
    return mixed ^ (mixed >> 16)


@triton.jit
def _decode(codes, exponents, LEVELS: tl.constexpr, FINE: tl.constexpr):  # noqa: N803
    """codes: [ROWS, BLOCK] int32 without a sign, exponents: [ROWS] int32."""
    below = LEVELS - codes
    below = tl.where(below < FINE, below, 2 * below - FINE + 1)
    numbers = tl.maximum(16 * exponents[:, None] + 15 - below, 1)
    return tl.where(codes > 0, numbers << 19, 0).to(tl.float32, bitcast=True)


@triton.jit
def _encode(values, random, LEVELS: tl.constexpr, FINE: tl.constexpr, LEAST: tl.constexpr):  # noqa: N803
    """[ROWS, BLOCK] int32 codes of values >= 0, at least LEAST but for 0, and [ROWS] exponents."""
    bits = values.to(tl.int32, bitcast=True)
    exponents = tl.max((bits + (random >> 1)) >> 23, axis=1)
    top = exponents[:, None]
    is_fine = (bits >> 23) > top - FINE // 16
    numbers = tl.where(is_fine, (bits + (random >> 1)) >> 19, ((bits + random) >> 20) << 1)
    below = 16 * top + 15 - numbers
    codes = tl.where(below < FINE, LEVELS - below, LEVELS - FINE - ((below - FINE) >> 1))
    return tl.where(bits > 0, tl.maximum(codes, LEAST), 0), exponents


@triton.jit(do_not_specialize=["start", "seed"])
def _adamw(
    weights, lower, gradients, first_codes, first_exponents, second_codes, second_exponents, num_elements, start, seed,
    beta1, beta2, eps, decay, step_size, inverse_sqrt_correction, grad_scale, new1, new2,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """weights, lower: as in kernels/adamw.py. new1, new2: 1 - beta1 and 1 - beta2."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    places = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, has_elements = places < num_elements, rows * BLOCK < num_elements
    gradient = tl.load(gradients + places, mask=inside, other=0.0).to(tl.float32) * grad_scale

    codes = tl.load(first_codes + places, mask=inside, other=0).to(tl.int32)
    first = _decode(codes & 127, tl.load(first_exponents + rows, mask=has_elements, other=0).to(tl.int32), 127, 64)
    first = beta1 * tl.where(codes > 127, -first, first) + new1 * gradient
    codes = tl.load(second_codes + places, mask=inside, other=0).to(tl.int32)
    second = _decode(codes, tl.load(second_exponents + rows, mask=has_elements, other=0).to(tl.int32), 255, 128)
    second = beta2 * second + new2 * gradient * gradient

    low = tl.load(lower + places, mask=inside, other=0).to(tl.int32)
    high = tl.load(weights + places, mask=inside, other=0).to(tl.int32) - (low < 0).to(tl.int32)
    master = ((high << 16) | (low & 0xFFFF)).to(tl.float32, bitcast=True)
    root = tl.sqrt_rn(second) * inverse_sqrt_correction + eps
    master = master * decay - tl.div_rn(step_size * first, root)
    bits = master.to(tl.int32, bitcast=True)
    low = bits.to(tl.int16)
    high = (bits >> 16) + (low < 0).to(tl.int32)
    tl.store(lower + places, low, mask=inside)
    tl.store(weights + places, high.to(tl.int16), mask=inside)

    random = _random_bits(start + places, seed)
    codes, exponents = _encode(tl.abs(first), (random & 0xFFFFF).to(tl.int32), 127, 64, 0)
    codes = tl.where((first < 0.0) & (codes > 0), codes | 128, codes)
    tl.store(first_codes + places, codes.to(tl.uint8), mask=inside)
    tl.store(first_exponents + rows, exponents.to(tl.uint8), mask=has_elements)
    codes, exponents = _encode(second, (random >> 12).to(tl.int32), 255, 128, 1)
    tl.store(second_codes + places, codes.to(tl.uint8), mask=inside)
    tl.store(second_exponents + rows, exponents.to(tl.uint8), mask=has_elements)


def adamw_8bit_step(
    weights: Tensor,
    lower: Tensor,
    gradient: Tensor,
    codes: tuple[Tensor, ...],
    start: int,
    seed: int,
    factors: tuple[float, ...],
) -> None:
    """Step bfloat16 weights with int16 lower halves; all tensors contiguous. factors: `training.optimizers.adamw.Factors`.

    codes: codes and exponents of the first moment, then of the second; start and seed: as `random_bits` takes them.
    """
    new_parts = 1.0 - factors[0], 1.0 - factors[1]
    # Products and sums are rounded one by one, as on a CPU.
    _adamw[(triton.cdiv(weights.numel(), _ROWS * _BLOCK),)](
        weights.view(torch.int16), lower, gradient, *codes, weights.numel(), start, seed, *factors, *new_parts,
        ROWS=_ROWS, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
