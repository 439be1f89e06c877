"""Moments of 8 bits: their formats, a step's rounding, and 200 steps against float64's AdamW."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.sft.checkpoint.moment_codes import (
    BLOCK,
    KINDS,
    decode,
    decoded,
    empty_codes,
    encode,
    exponents_of,
    random_bits,
    seed_of,
    set_codes,
)
from megatron.sft.checkpoint.optimizer_state import join_master_weights
from megatron.sft.training.optimizers import adamw_8bit
from megatron.sft.training.optimizers.adamw import InPlaceAdamW
from megatron.sft.training.optimizers.adamw_8bit import EightBitAdamW
from tests.unit.training.test_adamw import DEVICES, SETTINGS, float64_step, skip_without

STATES = ("master_param", *KINDS, *map(exponents_of, KINDS))


def moments(num_elements: int) -> dict[str, Tensor]:
    """Values over many powers of ten, with zeros and a block of zeros."""
    values = torch.randn(num_elements) * torch.exp(2 * torch.randn(num_elements)) * 1e-4
    values[:BLOCK] = values[BLOCK + 1] = 0
    return {"exp_avg": values, "exp_avg_sq": values.square()}


@pytest.mark.parametrize("kind", KINDS)
def test_codes_give_the_nearest_number_and_what_codes_gave_stays(kind: str) -> None:
    torch.manual_seed(0)
    values = moments(10_007)[kind]
    state = empty_codes(values)
    assert not decoded(state, kind).any()
    set_codes(state, kind, values)
    found = decoded(state, kind)
    largest = torch.nn.functional.pad(values.abs(), (0, -len(values) % BLOCK)).view(-1, BLOCK).amax(1).repeat_interleave(BLOCK)
    share = values.abs() / largest[: len(values)]
    upper, lower = (2**-2, 2**-10) if kind == "exp_avg" else (2.0**-6, 2.0**-21)
    error = (found - values).abs() / values.abs()
    assert error[share >= upper].max() <= 2**-5 and error[share >= lower].max() <= 2**-4
    assert not found[values == 0].any() and (kind == "exp_avg" or found[values > 0].all())
    # Saved in float32 and read again, or rounded at random: the same numbers.
    random = random_bits(3, len(values), seed_of(9), values.device) & 0xFFFFF
    for codes, exponents in (encode(found, kind, random), encode(found, kind, torch.zeros_like(random))):
        assert torch.equal(codes, state[kind]) and torch.equal(exponents, state[exponents_of(kind)])


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_keeps_the_mean(kind: str) -> None:
    torch.manual_seed(0)
    values = 1 + torch.rand(4096)
    total = torch.zeros(len(values), dtype=torch.float64)
    for step in range(400):
        random = random_bits(0, len(values), seed_of(step), values.device)
        total += decode(*encode(values, kind, (random >> (0 if kind == "exp_avg" else 12)) & 0xFFFFF), kind)
    error = total / 400 - values
    # One rounding differs by up to 1/16; its mean over 400 by 1/32 / sqrt(400) in one deviation.
    assert error.abs().max() <= 6 / 32 / 20 and error.mean().abs() <= 6 / 32 / math.sqrt(400 * 4096)


@pytest.mark.parametrize("device", DEVICES)
def test_parts_of_a_parameter_are_stepped_as_the_whole(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without(device)
    monkeypatch.setattr(adamw_8bit, "CPU_CHUNK", 10 * BLOCK)
    torch.manual_seed(2)
    start = (torch.randn(5003, device=device) * 0.02).bfloat16()
    cuts = [0, 7 * BLOCK, 40 * BLOCK, 5003]
    whole, parts = start.clone(), [start[first:last].clone() for first, last in itertools.pairwise(cuts)]
    one, several = EightBitAdamW([whole], **SETTINGS), EightBitAdamW(parts, **SETTINGS)
    several.starts = dict(zip(parts, cuts, strict=False))
    for _ in range(5):
        gradient = (torch.randn(5003, device=device) * 1e-3).bfloat16()
        for part, first, last in zip([whole, *parts], [0, *cuts[:-1]], [5003, *cuts[1:]], strict=True):
            part.decoupled_grad = gradient[first:last]  # type: ignore[attr-defined]
        one.step()
        several.step()
    assert torch.equal(whole, torch.cat(parts))
    for name in STATES:
        assert torch.equal(one.state[whole][name], torch.cat([several.state[part][name] for part in parts])), name


@pytest.mark.gpu
@pytest.mark.parametrize("gradient_dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_gives_the_codes_of_the_cpu(gradient_dtype: torch.dtype) -> None:
    skip_without("cuda")
    torch.manual_seed(3)
    start, scale = (torch.randn(100_003) * 0.02).bfloat16(), torch.exp(2 * torch.randn(100_003)) * 1e-3
    weights = {place: start.to(place, copy=True) for place in ("cpu", "cuda")}
    optimizers = {place: EightBitAdamW([weights[place]], **SETTINGS) for place in weights}
    for step in range(8):
        gradient = (torch.randn(100_003) * scale * (step != 5)).to(gradient_dtype)
        for place, optimizer in optimizers.items():
            optimizer.starts[weights[place]], optimizer.grad_scale = (1 << 31) + 64, 0.3
            weights[place].decoupled_grad = gradient.to(place)  # type: ignore[attr-defined]
            optimizer.step()
    ours, theirs = optimizers["cpu"].state[weights["cpu"]], optimizers["cuda"].state[weights["cuda"]]
    for name in STATES[1:]:
        assert torch.equal(ours[name], theirs[name].cpu()), name
    masters = [join_master_weights(weights[place], state["master_param"]).cpu() for place, state in
               (("cpu", ours), ("cuda", theirs))]  # fmt: skip
    # A CPU's square root may differ in its last bit.
    assert (masters[0] - masters[1]).abs().max() <= 8 * 2**-24 * masters[0].abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_200_steps_stay_with_float64(device: str, beta2: float) -> None:
    skip_without(device)
    torch.manual_seed(1)
    settings: dict[str, Any] = SETTINGS | {"betas": (0.9, beta2)}
    start = (torch.randn(20_000, device=device) * 0.02).bfloat16()
    ours = {kind: start.clone() for kind in (EightBitAdamW, InPlaceAdamW)}
    optimizers = [kind([weights], **settings) for kind, weights in ours.items()]
    master, first, second = start.double(), *torch.zeros(2, 20_000, dtype=torch.float64, device=device)
    scale = torch.exp(torch.randn(20_000, device=device)) * 1e-3
    direction = torch.randn(20_000, device=device) * scale
    for step in range(1, 201):
        # Gradients become smaller, as in training, and rounding must follow.
        gradient = ((direction + torch.randn(20_000, device=device) * scale) * 0.99**step).bfloat16()
        for weights in ours.values():
            weights.decoupled_grad = gradient  # type: ignore[attr-defined]
        for optimizer in optimizers:
            optimizer.step()
        master, first, second = float64_step(master, gradient.double(), first, second, step, settings)
    moved = master - start.double()
    error = {}
    for kind, optimizer in zip(ours, optimizers, strict=True):
        found = join_master_weights(ours[kind], optimizer.state[ours[kind]]["master_param"]).double()
        error[kind] = float((found - master).norm() / moved.norm())
        assert abs(float((found - start.double()).norm() / moved.norm()) - 1) <= 0.02
    assert error[InPlaceAdamW] <= 0.01 and error[EightBitAdamW] <= 0.06, error
