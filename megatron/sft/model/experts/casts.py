"""Experts' products in 8 bits: e4m3 values with a scale for each row of both factors, found from its present values.

A product sums along rows of both, so that scales are multiplied with its results and nothing is rounded to less than a row's
largest value has. Gradients are cast to e4m3 as well: with a scale for each token they need no e5m2, which torch does not take.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.sft.runtime import ranks

# The largest finite value of e4m3; what a row's largest value counts as at least, so that zeros have a scale.
LARGEST, LEAST = 448.0, 1e-30


@dataclass(frozen=True)
class Cast:
    """values: e4m3 [..., n, width]; scales: float32 [..., n], what each row is multiplied with."""

    values: Tensor
    scales: Tensor

    def restored(self) -> Tensor:
        """float32 [..., n, width]: what they stand for."""
        return self.values.float() * self.scales[..., None]

    def rows(self, places: Tensor) -> "Cast":
        """Of a matrix's cast, the rows [k] at these places."""
        # Elements of 8 bytes: torch copies element by element.
        gathered = self.values.view(torch.int64).index_select(0, places).view(self.values.dtype)
        return Cast(gathered, self.scales.index_select(0, places))


def cast_rows(values: Tensor) -> Cast:
    """Of values [..., n, width], in one pass on a GPU."""
    if values.is_cuda:
        from megatron.sft.kernels import casts

        return Cast(*casts.cast_rows(values.contiguous(), LARGEST, LEAST))
    wide = values.float()
    largest = wide.abs().amax(dim=-1).clamp(min=LEAST)
    return Cast((wide * (LARGEST / largest)[..., None]).to(torch.float8_e4m3fn), largest / LARGEST)


def cast_columns(values: Tensor) -> Cast:
    """Of values [n, height, width] transposed: [n, width, height]."""
    if values.is_cuda:
        from megatron.sft.kernels import casts

        return Cast(*casts.cast_columns(values.contiguous(), LARGEST, LEAST))
    return cast_rows(values.transpose(1, 2).contiguous())


class WeightCasts:
    """Weights [experts, outputs, inputs] in 8 bits, each made when it is first asked for: they must not change in between."""

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights.detach()

    @cached_property
    def by_output(self) -> Cast:
        """[experts, outputs, inputs], for the forward product."""
        return cast_rows(self._weights)

    @cached_property
    def by_input(self) -> Cast:
        """[experts, inputs, outputs], for the gradient of the rows."""
        return cast_columns(self._weights)


def product(rows: Cast, matrices: Cast, ends: Tensor, fast: bool = True) -> Tensor:
    """bfloat16 [n, k]: each row [n, m] times its expert's matrix, matrices [experts, k, m]. On a GPU.

    fast: sums stay in the tensor cores' own accumulators, whose rounding is far below e4m3's 3 bits; if not, they are added up
    in float32 every few values, for which torch's tiles are too large for the registers at these sizes.
    """
    functions: Any = F  # whose type hints lack it
    by_row = functions.ScalingType.RowWise
    result: Tensor = functions.scaled_grouped_mm(
        rows.values,
        matrices.values.transpose(1, 2),
        rows.scales,
        by_row,
        matrices.scales,
        by_row,
        offs=ends,
        output_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )
    return result


@cache
def can_multiply(device: torch.device) -> bool:
    """Whether experts of a model in fp8 are computed in 8 bits here; says why if not."""
    if device.type != "cuda":
        return True
    # torch has the kernel for Hopper alone.
    suits = hasattr(F, "scaled_grouped_mm") and hasattr(F, "ScalingType") and torch.cuda.get_device_capability(device) == (9, 0)
    if not suits:
        ranks.print_rank_0(
            f"experts are computed in bfloat16: {torch.cuda.get_device_name(device)} with torch {torch.__version__} has no "
            "grouped product in 8 bits (Hopper has, with torch 2.10 or newer)"
        )
    return suits
