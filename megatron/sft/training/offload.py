"""AdamW with a share of its state in CPU memory: OPTIMIZER_OFFLOAD.

Master weights and both moments of that share lie in the CPU's memory, in float32, and so do its gradients while they are
stepped. Every element is computed alone, by the same formula, wherever it is and however it is cut: neither the share nor what
happens at the same time changes a bit of a result.
"""

import os
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from megatron.sft.planning.memory import OFFLOADED_BYTES
from megatron.sft.runtime.errors import UserError
from megatron.sft.training.adamw import InPlaceAdamW
from megatron.sft.training.transfers import Factors, Shard, Transfers, step_elements


class OffloadedAdamW(InPlaceAdamW):
    """`InPlaceAdamW`'s place in megatron-core, with float32 states: `master_param`, `exp_avg` and `exp_avg_sq`.

    share: of the parameters' elements, whose states are in CPU memory. Weights of any dtype, gradients in float32. A step
    returns while the CPU computes: `finish`, or what `training.overlap` adds to a model, must come before weights or states of
    that share are read.
    """

    share = 1.0

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.shards: dict[Tensor, Shard] = {}
        self._transfers: Transfers | None = None

    def place(self, transfers: Transfers, places: dict[Tensor, int]) -> None:
        """Choose the parameters whose state is in CPU memory, before any has a state: the last ones that the share has room
        for, which the CPU has the most time to step.

        places: of every parameter in the forward pass; all optimizers with these `transfers` count in one.
        """
        self._transfers = transfers
        room = round(self.share * sum(map(torch.numel, places)))
        for parameter in sorted(places, key=places.__getitem__, reverse=True):
            if 0 < parameter.numel() <= room:
                self.shards[parameter] = transfers.add(places[parameter], parameter)
                room -= parameter.numel()

    def initialize_state(self, parameter: Tensor, *_: Any) -> None:
        """Zero moments, and the weights as master weights."""
        place = torch.device("cpu") if parameter in self.shards else parameter.device
        master = parameter.detach().to(place, copy=True).float()
        moments = {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
        self.state[parameter] = {**moments, "master_param": master}

    def check_memory(self) -> None:
        """A `UserError` if this machine's memory does not hold the states and gradients of its processes."""
        num_bytes = sum(map(torch.numel, self.shards)) * OFFLOADED_BYTES
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = psutil.virtual_memory().available
        if num_bytes * processes > free:
            raise UserError(
                f"OPTIMIZER_OFFLOAD={self.share:g} needs {num_bytes * processes / 1e9:.1f} GB of CPU memory for {processes} "
                f"process{'es' if processes > 1 else ''}, and {free / 1e9:.1f} GB are free: take a smaller share"
            )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient: of those on the GPU now, of the others from now on."""
        here, away = [], []
        for parameter, gradient, group in self.begin_step():
            beta1, beta2 = group["betas"]
            factors = Factors(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["step"], self.grad_scale)
            if shard := self.shards.get(parameter):
                shard.state = self.state[parameter]
                away.append((shard, gradient.view(-1), factors))
            else:
                here.append((parameter, gradient, factors))
        if away:
            assert self._transfers is not None
            self._transfers.fetch([(shard, gradient) for shard, gradient, _ in away if shard.arrived is None])
            self._transfers.step((shard, factors) for shard, _, factors in away)
        for parameter, gradient, factors in here:
            state = self.state[parameter]
            step_elements(state["master_param"], gradient, state["exp_avg"], state["exp_avg_sq"], factors)
            parameter.detach().copy_(state["master_param"])

    def finish(self) -> None:
        """Until the CPU has stepped all of its share; what it could not do is raised here."""
        if self._transfers is not None:
            self._transfers.wait(self.shards.values())

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's, after `finish`."""
        self.finish()
        return super().state_dict()

    def get_unscaled_state(self, parameter: Tensor, name: str) -> Tensor:
        """A state as it is stored, after `finish`."""
        self.finish()
        return super().get_unscaled_state(parameter, name)

    def set_scaled_state(self, parameter: Tensor, name: str, values: Tensor) -> None:
        """Set a state from a tensor of the same meaning, after `finish`."""
        self.finish()
        super().set_scaled_state(parameter, name, values)
