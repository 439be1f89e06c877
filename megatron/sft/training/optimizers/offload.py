"""AdamW with a share of its state in CPU memory: OPTIMIZER_OFFLOAD.

Master weights and both moments of that share lie in the CPU's memory, in float32, and so do its gradients while they are
stepped. Every element is computed alone, by the same formula, wherever it is and however it is cut: neither the share nor what
happens at the same time changes a bit of a result. `overlap` hides the work behind the GPU's:

- A bucket's gradients go to the CPU as soon as they are summed over the copies of the model, while the last micro-batch's
  backward pass runs. Only what is changed after that waits for the optimizer: with tensor parallelism weights that are not
  split, with pipeline parallelism the embeddings and the output layer, with fp16 everything.
- The CPU's step needs the norm of all gradients first. It runs behind the next step's first forward pass, in that order, and
  each layer waits for its own weights.
- Where copies of the model share the optimizer, a bucket's weights are gathered from them after its part is stepped here:
  hidden as before, but a whole bucket at a time. megatron-core makes one bucket of all later stages of a pipeline, and of all
  later chunks of a stage, which then start when all of theirs are stepped.
- Validation and saving wait for everything.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron.sft.checkpoint.optimizer_state import Share, inner_optimizers, shares
from megatron.sft.planning.memory import OFFLOADED_BYTES
from megatron.sft.runtime.errors import UserError
from megatron.sft.training.optimizers.adamw import InPlaceAdamW
from megatron.sft.training.optimizers.transfers import Factors, Shard, Transfers, step_elements


class OffloadedAdamW(InPlaceAdamW):
    """`InPlaceAdamW`'s place in megatron-core, with float32 states: `master_param`, `exp_avg` and `exp_avg_sq`.

    share: of the parameters' elements, whose states are in CPU memory. Weights of any dtype, gradients in float32. A step
    returns while the CPU computes: `finish`, or what `overlap` adds to a model, must come before weights or states of
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


def overlap(models: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Let the `OffloadedAdamW`s of these model chunks, given in the order of the forward pass, work while the GPU computes."""
    transfers = Transfers()
    held = {share.parameter: share for share in shares(optimizer)}
    order = [parameter for model in models for parameter in model.parameters() if parameter in held]
    places = {held[parameter].held: place for place, parameter in enumerate(order)}
    for inner in inner_optimizers(optimizer):
        mine = {parameter for group in inner.optimizer.param_groups for parameter in group["params"]}
        inner.optimizer.place(transfers, {parameter: place for parameter, place in places.items() if parameter in mine})
    away = {
        parameter: (share, share.optimizer.optimizer.shards[share.held])
        for parameter, share in held.items()
        if share.held in share.optimizer.optimizer.shards
    }
    for model in models:
        for group in [*model.bucket_groups, *model.expert_parallel_bucket_groups]:
            _follow(group, transfers, [(parameter, *away[parameter]) for parameter in _parameters(group) if parameter in away])
        _release_before_zeros(model, transfers)
        for module in model.module.modules():
            # A layer's parts are not all called as modules.
            parameters = module.parameters(recurse=isinstance(module, TransformerLayer))
            if needed := [away[parameter][1] for parameter in parameters if parameter in away]:
                _wait_before(module, transfers, needed)


def _parameters(group: Any) -> Iterator[torch.nn.Parameter]:
    return chain.from_iterable(bucket.params_list for bucket in group.buckets)


def _follow(group: Any, transfers: Transfers, away: list[tuple[torch.nn.Parameter, Share, Shard]]) -> None:
    """Fetch a group's gradients after their reduction starts, and wait for its weights before they are gathered."""
    reduce, gather = group.start_grad_sync, group.start_param_sync
    final = [(shard, _gradient(parameter, share)) for parameter, share, shard in away if _is_final(parameter, share)]
    needed = [shard for _, _, shard in away]
    alone = group.intra_distributed_optimizer_instance_size == 1

    def start_grad_sync(*arguments: Any, **keywords: Any) -> None:
        reduce(*arguments, **keywords)
        transfers.fetch(final, group.grad_reduce_handle)

    def start_param_sync(force_sync: bool = False) -> None:
        if alone:
            # Nothing to gather, and no reason to wait for more than a layer needs.
            group.param_gather_dispatched = True
        if force_sync or not alone:
            transfers.wait(needed)
        if not alone:
            gather(force_sync=force_sync)

    group.start_grad_sync, group.start_param_sync = start_grad_sync, start_param_sync


def _gradient(parameter: Any, share: Share) -> Tensor:
    part: Tensor = parameter.main_grad.view(-1)[share.start : share.stop]
    return part


def _is_final(parameter: Any, share: Share) -> bool:
    """Whether a gradient that is summed over the copies of the model is what the optimizer takes."""
    if share.optimizer.grad_scaler is not None:
        return False
    split = getattr(parameter, "tensor_model_parallel", False) or not getattr(parameter, "allreduce", True)
    if parallel_state.get_tensor_model_parallel_world_size() > 1 and not (split and parameter.dim() > 1):
        return False
    outer = getattr(parameter, "is_embedding_or_output_parameter", False) or getattr(parameter, "shared_embedding", False)
    return parallel_state.get_pipeline_model_parallel_world_size() == 1 or not outer


def _release_before_zeros(model: Any, transfers: Transfers) -> None:
    zero = model.zero_grad_buffer

    def zero_grad_buffer() -> None:
        transfers.release()
        zero()

    model.zero_grad_buffer = zero_grad_buffer


def _wait_before(module: torch.nn.Module, transfers: Transfers, needed: list[Shard]) -> None:
    def hook(*_: Any) -> None:
        transfers.wait(needed)

    module.register_forward_pre_hook(hook)
