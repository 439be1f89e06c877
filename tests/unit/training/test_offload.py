"""The offloaded optimizer's step, cut into pieces, against torch's AdamW of whole parameters, bit by bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.sft.runtime import device as devices
from megatron.sft.runtime.errors import UserError
from megatron.sft.training.optimizers import offload, transfers
from megatron.sft.training.optimizers.offload import OffloadedAdamW
from megatron.sft.training.optimizers.transfers import Transfers

SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SIZES = [5003, 1, 1000, 700, 2048]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the weights are. On the CPU the streams are what `device.prepare` makes of them."""
    monkeypatch.setattr(transfers, "_PIECE", 256)
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if request.param == "cpu":
        for name in ("Stream", "Event", "current_stream", "stream"):
            monkeypatch.setattr(torch.cuda, name, _nothing if name == "stream" else devices._NoStream)
    return str(request.param)


def _nothing(_: Any) -> Any:
    import contextlib

    return contextlib.nullcontext()


def _weights(device: str, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [(torch.randn(size) * 0.02).to(dtype).to(device) for size in SIZES]


def _gradients(step: int) -> list[Tensor]:
    torch.manual_seed(step)
    return [torch.randn(size) * 1e-3 for size in SIZES]


def _optimizer(weights: list[Tensor], share: float = 1.0) -> OffloadedAdamW:
    optimizer = OffloadedAdamW(weights, **SETTINGS)
    optimizer.share = share
    optimizer.place(Transfers(), {parameter: place for place, parameter in enumerate(weights)})
    return optimizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_steps_in_pieces_are_those_of_whole_parameters(device: str, dtype: torch.dtype) -> None:
    weights = _weights(device, dtype)
    optimizer = _optimizer(weights)
    expected = [torch.nn.Parameter(each.cpu().float()) for each in _weights(device, dtype)]
    whole = torch.optim.AdamW(expected, fused=True, **SETTINGS)
    for step in range(1, 21):
        optimizer.grad_scale = 0.25 if step % 3 else 1.0
        for parameter, reference, gradient in zip(weights, expected, _gradients(step), strict=True):
            parameter.decoupled_grad = gradient.to(device)  # type: ignore[attr-defined]
            reference.grad = gradient * optimizer.grad_scale
        optimizer.step()
        whole.step()
        optimizer.finish()
        assert all(torch.equal(a.cpu(), b.detach().to(dtype)) for a, b in zip(weights, expected, strict=True)), step
    for parameter, reference in zip(weights, expected, strict=True):
        state = optimizer.state[parameter]
        assert torch.equal(state["master_param"], reference.detach()) and state["master_param"].device.type == "cpu"
        assert all(torch.equal(state[name], whole.state[reference][name]) for name in ("exp_avg", "exp_avg_sq"))


def test_gradients_may_change_once_released_and_weights_are_back_when_they_were_waited_for(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a training step does it: nothing but the streams' order keeps gradients and weights apart."""
    size = 1 << (22 if device == "cuda" else 12)
    monkeypatch.setattr(transfers, "_PIECE", size // 4)
    torch.manual_seed(0)
    weights = [torch.randn(size, dtype=torch.bfloat16).to(device) for _ in range(4)]
    expected = [torch.nn.Parameter(each.cpu().float()) for each in weights]
    whole = torch.optim.AdamW(expected, fused=True, **SETTINGS)
    optimizer, moving = OffloadedAdamW(weights, **SETTINGS), Transfers()
    optimizer.place(moving, {parameter: place for place, parameter in enumerate(weights)})
    sources = [torch.randn(size).to(device) for _ in weights]
    gradients = [torch.zeros(size, device=device) for _ in weights]
    busy = torch.randn(size >> 10, size >> 10, device=device)
    for step in range(1, 6):
        for parameter, gradient, source in zip(weights, gradients, sources, strict=True):
            gradient += step * source
            if parameter is not weights[1]:
                moving.fetch([(optimizer.shards[parameter], gradient)])
            parameter.decoupled_grad = gradient  # type: ignore[attr-defined]
        optimizer.step()
        moving.release()
        for gradient in gradients:
            gradient.zero_()
        for _ in range(20):
            busy = (busy @ busy).clamp_(-1, 1)
        taken = []
        for parameter in weights:
            moving.wait([optimizer.shards[parameter]])
            taken.append(parameter.clone())
        for reference, source in zip(expected, sources, strict=True):
            reference.grad = step * source.cpu()
        whole.step()
        for found, reference in zip(taken, expected, strict=True):
            assert torch.equal(found.cpu(), reference.detach().bfloat16()), step


def test_a_share_takes_the_last_parameters_that_it_has_room_for(device: str) -> None:
    weights = _weights(device, torch.bfloat16)
    taken = {}
    for share in (0.0, 0.25, 0.5, 1.0):
        taken[share] = sorted(map(torch.numel, _optimizer(weights, share).shards))
    assert taken == {0.0: [], 0.25: [1, 2048], 0.5: [1, 700, 1000, 2048], 1.0: sorted(SIZES)}


def test_too_little_memory_is_said_before_the_first_step(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = _optimizer(_weights(device, torch.bfloat16))
    optimizer.check_memory()
    monkeypatch.setattr(offload, "OFFLOADED_BYTES", 1 << 40)
    with pytest.raises(UserError, match=r"OPTIMIZER_OFFLOAD=1 needs .* GB of CPU memory for 1 process, and .* are free"):
        optimizer.check_memory()
