"""A live model's parameters as slices of stored tensors: megatron-core says which slice of which tensor a parameter is."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

from megatron.sft.checkpoint.folder import MANIFEST, TORCH_DIST, Checkpoint
from megatron.sft.checkpoint.reading import SliceReader, StoredParameters, stored_parameters
from megatron.sft.checkpoint.shard_slice import ShardSlice, balanced, contiguous_blocks
from megatron.sft.checkpoint.torch_format import EMBEDDING, OUTPUT, padded
from megatron.sft.checkpoint.writing import CONTENT_METADATA
from megatron.sft.families.registry import read_architecture
from megatron.sft.families.rules import tensor_parallel_part
from megatron.sft.model.layout import Layout
from megatron.sft.model.live_weights import is_adapter, live_weights
from megatron.sft.runtime.errors import UserError


def model_tensors(modules: Iterable[Any]) -> list[ShardedTensor]:
    """megatron-core's descriptions of this process's weights without adapters; their data are the parameters' own memory."""
    found: list[ShardedTensor] = []
    with torch.no_grad():
        for module in modules:
            state = module.sharded_state_dict(metadata=dict(CONTENT_METADATA))  # it adds a process group
            # The state of FP8 layers, which another backend's layers do not have, is saved by checkpoint/fp8_state.py.
            state = {key: value for key, value in state.items() if not (is_adapter(key) or _is_extra_state(key, value))}
            for tensor in nested_values(state):
                # A gate and an up projection are one parameter here and lie apart in the checkpoint.
                found += nested_values(tensor.build()) if isinstance(tensor, ShardedTensorFactory) else [tensor]
    assert all(isinstance(tensor, ShardedTensor) for tensor in found), found
    return found


def _is_extra_state(key: str, value: Any) -> bool:
    return key.endswith("_extra_state") or (isinstance(value, ShardedObject) and value.key.endswith("_extra_state"))


def to_slice(tensor: ShardedTensor) -> ShardSlice:
    """The slice that megatron-core describes; its values are the parameter's own memory."""
    data: Tensor = tensor.data.detach()
    sizes = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    offsets, whole = tuple(tensor.global_offset), tuple(tensor.global_shape)
    return ShardSlice(tensor.key, offsets, sizes, whole, data.dtype, lambda: data, tensor.allow_shape_mismatch)


def is_saved_copy(tensor: ShardedTensor) -> bool:
    """Whether this process holds the copy that is saved, apart from data parallelism, over which all copies are equal."""
    return not any(tensor.replica_id[:-1])


def tensors_to_write(tensors: list[ShardedTensor]) -> list[ShardedTensor]:
    """The tensors that this process writes: each is written once, and data-parallel ranks share them by bytes."""
    tensors = [tensor for tensor in tensors if is_saved_copy(tensor)]
    # Experts have other copies than the rest of the model.
    experts = [tensor for tensor in tensors if ".experts." in tensor.key and tensor.replica_id[-1] == 0]
    others = [tensor for tensor in tensors if ".experts." not in tensor.key]
    data_parallel = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    parts = balanced([tensor.data.nbytes for tensor in others], data_parallel)
    owned = (others[index] for rank, part in enumerate(parts) for index in part if others[index].replica_id[-1] == rank)
    return [*owned, *experts]


def slices_of_range(
    parameter: Tensor, tensors: list[ShardedTensor], start: int, stop: int
) -> Iterator[tuple[ShardSlice, int, int]]:
    """The slices that are the elements `start` to `stop` of a flattened parameter, which consists of `tensors`.

    Yields each with its place in that range, (first, last + 1). Its values are the parameter's own until they are replaced.
    """
    for tensor in tensors:
        first = (tensor.data.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        low, high = max(start - first, 0), min(stop - first, tensor.data.numel())
        if low >= high:
            continue
        whole = to_slice(tensor)
        lead = len(whole.offsets) - tensor.data.dim()  # dimensions of layer and expert
        for offsets, sizes, block_start in contiguous_blocks(tuple(tensor.data.shape), low, high):
            inner = (a + b for a, b in zip(whole.offsets[lead:], offsets, strict=True))
            block = replace(whole, offsets=(*whole.offsets[:lead], *inner), sizes=(*whole.sizes[:lead], *sizes))
            place = first + block_start - start
            yield block, place, place + prod(sizes)


def tensors_by_parameter(tensors: list[ShardedTensor], parameters: Iterable[nn.Parameter]) -> dict[Any, list[ShardedTensor]]:
    """The tensors that lie in each parameter's memory; together they are the whole parameter."""
    by_address = sorted(parameters, key=lambda parameter: parameter.data_ptr())
    addresses = [parameter.data_ptr() for parameter in by_address]
    found: dict[Any, list[ShardedTensor]] = {parameter: [] for parameter in by_address}
    for tensor in tensors:
        index = bisect_right(addresses, tensor.data.data_ptr()) - 1
        if index >= 0 and tensor.data.data_ptr() < addresses[index] + by_address[index].nbytes:
            found[by_address[index]].append(tensor)
    for parameter, parts in found.items():
        assert sum(part.data.numel() for part in parts) == parameter.numel(), "a parameter is not described whole"
    return found


def load_weights(checkpoint: Checkpoint, chunks: Sequence[nn.Module], layout: Layout) -> None:
    """Fill the parameters of this process's model chunks from a checkpoint of either format and of any layout.

    A checkpoint that does not hold them whole, or that is not of this model, is a `UserError`.
    """
    if checkpoint.format == TORCH_DIST:
        SliceReader(checkpoint.path).fill([to_slice(tensor) for tensor in model_tensors(chunks)])
        return
    config = checkpoint.manifest.get("source", {}).get("config")
    if config is None:
        raise UserError(f"{checkpoint.path} has no {MANIFEST} with the model's configuration: run scripts/2_convert.sh on it")
    source = stored_parameters(checkpoint, read_architecture(config, str(checkpoint.path / MANIFEST)))
    for chunk in chunks:
        _fill_from_whole(chunk, source, layout)


@torch.no_grad()
def _fill_from_whole(model: Any, source: StoredParameters, layout: Layout) -> None:
    architecture = source.architecture
    for weight in live_weights(model, architecture, layout):
        entry, whole = weight.entry, source.read(weight.entry)
        if entry.megatron in (EMBEDDING, OUTPUT):
            whole = padded(whole, layout.padded_vocab_size(architecture))
        rank, size = parallel_state.get_tensor_model_parallel_rank(), layout.tensor_parallel
        if entry.expert is not None:
            rank, size = parallel_state.get_expert_tensor_parallel_rank(), layout.expert_tensor_parallel
        weight.values.copy_(tensor_parallel_part(entry.rule, whole, rank, size))
