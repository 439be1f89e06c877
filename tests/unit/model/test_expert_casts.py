"""Experts' products in 8 bits: what casts keep, products and gradients next to exact ones, and when weights are cast again.

`-m gpu` runs the same on Triton's casts and torch's grouped product, and compares the casts with torch's.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron.sft.model.experts import routed_rows as routed
from megatron.sft.model.experts.casts import Cast, can_multiply, cast_columns, cast_rows
from megatron.sft.model.experts.grouped_linear import GroupedLinear, grouped_product

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Rows of each expert: none, one, and no multiple of what tensor cores take at once.
COUNTS = [0, 37, 1, 300, 0, 130]
INPUTS, OUTPUTS = 208, 144


def rows_and_ends(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[n, INPUTS], whose sizes differ by row by a factor of 1,000, and its ends."""
    rows = torch.randn(sum(COUNTS), INPUTS) * torch.logspace(-2, 1, sum(COUNTS))[torch.randperm(sum(COUNTS))][:, None]
    return rows.to(device, dtype), torch.tensor(COUNTS, device=device).cumsum(0).int()


def difference(given: Tensor, expected: Tensor) -> float:
    """Relative, of the whole tensors."""
    return float((given.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("device", DEVICES)
def test_a_cast_keeps_four_digits_of_all_that_is_not_far_below_its_rows_largest_value(device: str) -> None:
    torch.manual_seed(0)
    values = rows_and_ends(device, torch.bfloat16)[0]
    values[3], values[4, 5], values[5] = 0.0, float("nan"), values[5] * 1e-35
    values[6, 7] = float("inf")
    exact = values.float()
    cast = cast_rows(values)
    assert cast.values.dtype == torch.float8_e4m3fn and cast.scales.shape == (len(values),)
    restored = cast.restored()
    assert restored[3].eq(0).all() and restored[4, 5].isnan() and restored[6, 7].isnan()
    assert restored[5].isfinite().all()
    good = [place for place in range(len(values)) if place not in (3, 4, 5, 6)]
    exact, restored = exact[good], restored[good]
    largest = exact.abs().amax(dim=1, keepdim=True)
    assert ((restored - exact).abs() <= exact.abs() / 16 + largest / 448 / 512).all()
    assert ((restored.abs().amax(dim=1, keepdim=True) - largest).abs() <= 1e-6 * largest).all()


@pytest.mark.parametrize("device", DEVICES)
def test_columns_are_cast_as_the_rows_of_the_transposed_matrix(device: str) -> None:
    torch.manual_seed(0)
    values = (torch.randn(3, 150, 200) * torch.rand(3, 1, 200)).to(device, torch.bfloat16)
    by_columns, by_rows = cast_columns(values), cast_rows(values.transpose(1, 2).contiguous())
    assert by_columns.values.shape == (3, 200, 150) and by_columns.values.is_contiguous()
    torch.testing.assert_close(by_columns.scales, by_rows.scales, rtol=1e-6, atol=0)
    assert (by_columns.values.float() == by_rows.values.float()).float().mean() > 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 768, 2048, 5120, 28672])
def test_kernels_cast_as_torch_does(width: int) -> None:
    torch.manual_seed(0)
    values = torch.randn(2, 70, width, dtype=torch.bfloat16)
    for function in (cast_rows, cast_columns):
        here, there = function(values), function(values.cuda())
        torch.testing.assert_close(there.scales.cpu(), here.scales, rtol=1e-6, atol=0)
        first, second = here.values.float(), there.values.cpu().float()
        assert (first == second).float().mean() > 0.999
        # Where the scales differ in the last digit, by no more than a step.
        assert ((first - second).abs() <= first.abs() / 8 + 1e-2).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trained", [True, False])
def test_products_and_gradients_of_the_rows_are_near_the_exact_ones_and_those_of_the_weights_as_in_16_bits(
    device: str, trained: bool
) -> None:
    torch.manual_seed(0)
    rows, ends = rows_and_ends(device, torch.bfloat16)
    layer = GroupedLinear(len(COUNTS), OUTPUTS, INPUTS, torch.bfloat16, in_8_bits=True).to(device)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape) * torch.rand(len(COUNTS), OUTPUTS, 1) * INPUTS**-0.5)
    layer.weight.requires_grad_(trained)
    upstream = torch.randn(len(rows), OUTPUTS).to(device, torch.bfloat16)
    results = {}
    for name in ("8 bits", "16 bits", "exact"):
        dtype = torch.float32 if name == "exact" else torch.bfloat16
        mine = rows.to(dtype).clone().requires_grad_()
        weight = layer.weight if name == "8 bits" else layer.weight.detach().to(dtype).requires_grad_(trained)
        output = layer(mine, ends)[0] if name == "8 bits" else grouped_product(mine, weight, ends)
        output.backward(upstream.to(dtype))
        results[name] = output.detach(), mine.grad, weight.grad
    output, of_rows, of_weights = results["8 bits"]
    assert output.dtype == of_rows.dtype == torch.bfloat16  # type: ignore[union-attr]
    for given, exact in zip((output, of_rows), results["exact"][:2], strict=True):
        # Each value is rounded by 2.6 % on average, in two factors; and 8 bits it is.
        assert 1e-2 < difference(given, exact) < 4e-2  # type: ignore[arg-type]
        # Every token by itself: small ones are as exact as large ones.
        errors = (given.float() - exact).norm(dim=1) / exact.norm(dim=1)  # type: ignore[union-attr]
        assert errors.max() < 8e-2
    if trained:
        assert torch.equal(of_weights, results["16 bits"][2])  # type: ignore[arg-type]
        assert of_weights[0].eq(0).all() and of_weights[3].ne(0).any()  # type: ignore[index]
    else:
        assert of_weights is None


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("kind", ["silu", "clamped_silu"])
@pytest.mark.parametrize("device", DEVICES)
def test_an_activation_in_8_bits_is_the_cast_of_that_in_16_with_its_gradients(device: str, kind: str, written: bool) -> None:
    torch.manual_seed(0)
    tokens, width = 50, 80
    chosen = torch.randint(0, len(COUNTS), (tokens, 2), device=device)
    rows = routed.routed_rows(chosen, len(COUNTS))
    inputs = [torch.randn(2 * tokens, 2 * width), torch.rand(2 * tokens), torch.randn(len(COUNTS), 2 * width)]
    results = []
    for with_cast in (False, True):
        gate_up, weights, values = (each.to(device, torch.bfloat16).requires_grad_() for each in inputs)
        weights = inputs[1].to(device).requires_grad_()
        bias = routed.expert_bias(values, rows.ends, 2 * tokens) if kind == "clamped_silu" else None
        if with_cast:
            active, cast = routed.weighted_swiglu_and_cast(gate_up, weights, kind, bias, written)
        else:
            active = routed.weighted_swiglu(gate_up, weights, kind, bias)
            cast = cast_rows(active.detach())
        active.backward(torch.sin(torch.arange(active.numel(), device=device)).view_as(active).to(active.dtype))
        results.append((active.detach(), cast, [each.grad for each in (gate_up, weights, values) if each.grad is not None]))
    (plain, apart, expected), (active, together, given) = results
    if written:
        torch.testing.assert_close(active, plain)
    torch.testing.assert_close(together.scales, apart.scales, rtol=1e-6, atol=0)
    assert (together.values.float() == apart.values.float()).float().mean() > 0.999
    assert len(given) == (3 if bias is not None else 2)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_gathered_casts_are_casts_of_gathered_rows(device: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(20, 48).to(device, torch.bfloat16)
    rows = routed.routed_rows(torch.randint(0, 6, (20, 3), device=device), 6)
    gathered, expected = cast_rows(hidden).rows(rows.tokens), cast_rows(hidden[rows.tokens])
    assert torch.equal(gathered.values.float(), expected.values.float()) and torch.equal(gathered.scales, expected.scales)


@pytest.mark.parametrize("device", DEVICES)
def test_without_any_row_a_product_is_empty(device: str) -> None:
    layer = GroupedLinear(2, OUTPUTS, INPUTS, torch.bfloat16, in_8_bits=True).to(device)
    torch.nn.init.ones_(layer.weight)
    rows = torch.empty(0, INPUTS, dtype=torch.bfloat16, device=device, requires_grad=True)
    output, _ = layer(rows, torch.zeros(2, dtype=torch.int32, device=device))
    output.sum().backward()
    assert output.shape == (0, OUTPUTS) and rows.grad is not None and rows.grad.shape == rows.shape
    assert layer.weight.grad.eq(0).all()  # type: ignore[union-attr]


class Model(MegatronModule):
    """What megatron-core's schedules tell that a step begins."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.trained = GroupedLinear(2, 16, 32, torch.float32, in_8_bits=True)
        self.frozen = GroupedLinear(2, 16, 32, torch.float32, in_8_bits=True)
        self.frozen.requires_grad_(False)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter)


def test_weights_are_cast_once_a_step_and_frozen_ones_once() -> None:
    torch.manual_seed(0)
    model = Model(SimpleNamespace(fp8="hybrid", fp4=None))
    rows, ends = torch.randn(6, 32, requires_grad=True), torch.tensor([2, 6], dtype=torch.int32)
    model.set_is_first_microbatch()

    def casts() -> list[Cast]:
        found = []
        for layer in (model.trained, model.frozen):
            layer(rows, ends)[0].sum().backward()
            held: Any = layer._casts
            found += [held.by_output, held.by_input]
        return found

    first, second = casts(), casts()
    model.set_is_first_microbatch()
    with torch.no_grad():
        model.trained.weight.data.mul_(3.0)
    third = casts()
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert [a is b for a, b in zip(second, third, strict=True)] == [False, False, True, True]
    for old, new in zip(first[:2], third[:2], strict=True):
        torch.testing.assert_close(new.restored(), 3.0 * old.restored())


@pytest.mark.gpu
def test_hopper_computes_experts_in_8_bits() -> None:
    here = torch.device("cuda", torch.cuda.current_device())
    assert can_multiply(here) == (torch.cuda.get_device_capability(here) == (9, 0))
