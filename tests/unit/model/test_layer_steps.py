"""Norm, SwiGLU and rotary positions against float64 formulas with gradients; `-m gpu` runs the same on Triton kernels."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.sft.model.norm import add_and_norm
from megatron.sft.model.rotary import rotary_tables, rotate, split_and_rotate
from megatron.sft.model.swiglu import swiglu

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Rounding of results, relative to the largest value; sums over many tokens go through float32.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
T, GROUPS, QUERIES, DIM = 37, 2, 3, 16


def agree(
    function: Callable[..., tuple[Tensor, ...]], formula: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]
) -> None:
    """`function` of the inputs and `formula` of them in float64 must give the same, and the same gradients."""
    mine = [tensor.clone().requires_grad_() for tensor in inputs]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    results, expected = function(*mine), formula(*exact)
    weights = [torch.randn(result.shape, dtype=result.dtype, device=result.device) for result in results]
    torch.autograd.backward(results, weights)
    torch.autograd.backward(expected, [weight.double() for weight in weights])
    pairs = list(zip(results, expected, strict=True)) + [
        (a.grad, b.grad) for a, b in zip(mine, exact, strict=True) if a.grad is not None and b.grad is not None
    ]
    assert len(pairs) == len(results) + len(inputs)
    for result, wanted in pairs:
        largest = wanted.abs().max()
        assert (result.double() - wanted).abs().max() <= TOLERANCES[inputs[0].dtype] * largest, (result, wanted)


def random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device=device).to(dtype)


def rms_norm(values: Tensor, weight: Tensor) -> Tensor:
    return weight * values / (values.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [48, 1536, 5000])
def test_the_norm_with_and_without_an_addition_is_the_formula(device: str, dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    residual, added = (random(T, 1, width, dtype=dtype, device=device) for _ in range(2))
    weight = random(width, dtype=dtype, device=device)
    if dtype == torch.float32:
        agree(
            lambda r, a, w: add_and_norm(r, a, w, 1e-5), lambda r, a, w: (r + a, rms_norm(r + a, w)), [residual, added, weight]
        )
    agree(lambda r, w: add_and_norm(r, None, w, 1e-5), lambda r, w: (r.clone(), rms_norm(r, w)), [residual, weight])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [24, 3000])
def test_swiglu_is_the_formula(device: str, dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    gate_up = random(T, 1, 2 * width, dtype=dtype, device=device)
    agree(lambda x: (swiglu(x),), lambda x: (F.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1],), [gate_up])


def turned(heads: Tensor, angles: Tensor) -> Tensor:
    """Each pair of dimensions (i, i + dim / 2) as a complex number, times e^(i angle)."""
    first, second = heads.chunk(2, dim=-1)
    product = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([product.real, product.imag], dim=-1)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [16, 24])
def test_queries_and_keys_are_turned_by_their_positions_and_values_are_not(device: str, dtype: torch.dtype, dim: int) -> None:
    torch.manual_seed(0)
    positions = torch.randint(0, 50, (T,), device=device)
    frequencies = torch.rand(dim // 2, device=device)
    tables = rotary_tables(positions, frequencies)
    angles = torch.outer(positions.double(), frequencies.double())

    def formula(mixed: Tensor) -> tuple[Tensor, ...]:
        by_group = mixed.view(T, GROUPS, QUERIES + 2, dim)
        queries = by_group[:, :, :QUERIES].reshape(T, GROUPS * QUERIES, dim)
        return turned(queries, angles), turned(by_group[:, :, QUERIES], angles), by_group[:, :, QUERIES + 1].clone()

    mixed = random(T, GROUPS * (QUERIES + 2) * dim, dtype=dtype, device=device)
    agree(lambda x: split_and_rotate(x, tables, GROUPS, dim), formula, [mixed])
    heads = random(T, QUERIES, dim, dtype=dtype, device=device)
    agree(lambda x: (rotate(x, tables),), lambda x: (turned(x, angles),), [heads])
