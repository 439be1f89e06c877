"""The 16-bit optimizer's step against float64 on the same stored values, and against torch's float32 AdamW over 50 steps."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.sft.checkpoint.optimizer_state import join_master_weights, split_master_weights
from megatron.sft.training.optimizers import adamw
from megatron.sft.training.optimizers.adamw import InPlaceAdamW

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def skip_without(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")


def float64_step(
    master: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, settings: dict[str, Any] = SETTINGS
) -> tuple[Tensor, ...]:
    """AdamW with decoupled weight decay as Loshchilov and Hutter (2019) have it."""
    beta1, beta2 = settings["betas"]
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * gradient**2
    update = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + settings["eps"])
    return master * (1 - settings["lr"] * settings["weight_decay"]) - settings["lr"] * update, first, second


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gradient_dtype", [torch.bfloat16, torch.float32])
def test_a_step_is_float64s_on_the_same_stored_values(
    device: str, gradient_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without(device)
    monkeypatch.setattr(adamw, "CPU_CHUNK", 1000)
    torch.manual_seed(0)
    master = torch.randn(5003, device=device) * 0.02
    weights, lower = split_master_weights(master)
    optimizer = InPlaceAdamW([weights], **SETTINGS)
    optimizer.allocate(6)
    state = optimizer.state[weights]
    state["master_param"].copy_(lower)
    state["exp_avg"].copy_(torch.randn_like(master) * 1e-3)
    state["exp_avg_sq"].copy_(torch.rand_like(master) * 1e-6)
    stored = [state["exp_avg"].double(), state["exp_avg_sq"].double()]
    gradient = (torch.randn_like(master) * 1e-3).to(gradient_dtype)
    kept = gradient.clone()
    weights.decoupled_grad = gradient  # type: ignore[attr-defined]
    optimizer.grad_scale = 0.25
    optimizer.step()
    expected, first, second = float64_step(master.double(), gradient.double() * 0.25, *stored, 7)
    found = join_master_weights(weights, state["master_param"]).double()
    # An update of up to lr, computed in float32, on a weight of up to 0.1.
    assert (found - expected).abs().max() <= 4 * 2**-24 * expected.abs().max()
    assert torch.equal(weights, found.float().bfloat16()) or (weights.double() - found).abs().max() <= 2**-8 * 0.1
    for name, value in (("exp_avg", first), ("exp_avg_sq", second)):
        assert ((state[name].double() - value).abs() <= (2**-8 + 1e-6) * value.abs()).all(), name
    assert torch.equal(gradient, kept)
    assert optimizer.param_groups[0]["step"] == 7


@pytest.mark.parametrize("device", DEVICES)
def test_fifty_steps_stay_with_the_float32_optimizer(device: str) -> None:
    skip_without(device)
    torch.manual_seed(1)
    start = (torch.randn(20000, device=device) * 0.02).bfloat16()
    ours, theirs = start.clone(), torch.nn.Parameter(start.float())
    optimizer = InPlaceAdamW([ours], **SETTINGS)
    reference = torch.optim.AdamW([theirs], **SETTINGS)
    direction = torch.randn(20000, device=device) * 1e-3
    for _ in range(50):
        gradient = direction + torch.randn(20000, device=device) * 1e-3
        ours.decoupled_grad = gradient.bfloat16()  # type: ignore[attr-defined]
        theirs.grad = ours.decoupled_grad.float()  # type: ignore[attr-defined]
        optimizer.step()
        reference.step()
    moved = theirs.detach() - start.float()
    difference = join_master_weights(ours, optimizer.state[ours]["master_param"]) - theirs.detach()
    # Moments of 8 bits change a step by up to 2^-8 of it; their roundings are independent.
    assert difference.norm() <= 5e-3 * moved.norm()


def test_a_group_without_weight_decay_and_a_parameter_without_gradient_are_respected() -> None:
    decayed, kept, idle = (torch.ones(8, dtype=torch.bfloat16) for _ in range(3))
    groups = [{"params": [decayed]}, {"params": [kept], "weight_decay": 0.0}, {"params": [idle]}]
    optimizer = InPlaceAdamW(groups, **(SETTINGS | {"lr": 0.1}))
    for parameter in (decayed, kept):
        parameter.decoupled_grad = torch.zeros(8, dtype=torch.bfloat16)  # type: ignore[attr-defined]
    optimizer.step()
    state = optimizer.state
    assert torch.allclose(join_master_weights(decayed, state[decayed]["master_param"]), torch.tensor(0.99))
    assert torch.equal(kept, torch.ones(8, dtype=torch.bfloat16)) and torch.equal(idle, torch.ones(8, dtype=torch.bfloat16))
    assert math.isclose(float(state[kept]["exp_avg"].abs().sum()), 0.0) and not state[idle]
