"""Adapters in a checkpoint: stored whole under PEFT's names, whatever the layout they were trained in."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron.sft.checkpoint.folder import Checkpoint
from megatron.sft.checkpoint.model_shards import to_slice
from megatron.sft.checkpoint.optimizer_state import PREFIX, fill_master_weights
from megatron.sft.checkpoint.reading import SliceReader
from megatron.sft.checkpoint.shard_slice import ShardSlice
from megatron.sft.model.lora.adapters import Adapter

_MASTER = f"{PREFIX}.param."


def adapter_tensors(chunks: Iterable[Any]) -> list[ShardedTensor]:
    """Descriptions of this process's adapters as megatron-core's of its weights; their data are the parameters' own memory."""
    data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    expert_data_rank = parallel_state.get_expert_data_parallel_rank()
    found = []
    for chunk in chunks:
        for adapter in (module for module in chunk.modules() if isinstance(module, Adapter)):
            for part in adapter.parts():
                copy = (adapter.split.rank if part.replicated else 0, expert_data_rank if part.expert else data_rank)
                found.append(
                    ShardedTensor(
                        part.name,
                        part.values,
                        part.values.dtype,
                        tuple(part.values.shape),
                        part.whole,
                        part.offsets,
                        None,
                        (0, *copy),
                    )
                )
    return found


def fill_adapters(optimizer: Any, tensors: list[ShardedTensor], whole: Callable[[str, tuple[int, ...]], Tensor]) -> None:
    """Set adapters and their float32 master weights. `whole`: a factor in float32 by PEFT's name and shape."""

    def read(slices: Sequence[ShardSlice]) -> None:
        for wanted in slices:
            place = tuple(slice(start, start + size) for start, size in zip(wanted.offsets, wanted.sizes, strict=True))
            values = whole(wanted.key.removeprefix(_MASTER), wanted.whole)[place]
            wanted.values().view(wanted.sizes).copy_(values)

    with torch.no_grad():
        read([to_slice(tensor) for tensor in tensors])
    optimizer.reload_model_params()
    fill_master_weights(optimizer, tensors, read)


class StoredAdapters:
    """The adapters of a checkpoint: their float32 master weights, by PEFT's names."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._reader = SliceReader(checkpoint.path)
        self.names = sorted(key.removeprefix(_MASTER) for key in self._reader.tensors if key.startswith(_MASTER))

    def tensor(self, name: str) -> Tensor:
        """A factor, [rank, inputs] or [outputs, rank] in float32."""
        key = _MASTER + name
        whole = tuple(self._reader.tensors[key].size)
        target = torch.empty(whole, dtype=torch.float32)
        return self._reader.read(ShardSlice(key, (0,) * len(whole), whole, whole, torch.float32, lambda: target))
