"""What OPTIMIZER_OFFLOAD hides: where a training step starts to move gradients, and where it waits for weights.

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

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron.sft.checkpoint.optimizer_state import Share, inner_optimizers, shares
from megatron.sft.training.transfers import Shard, Transfers


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
