"""The `torch_dist` format: megatron-core's dist_checkpointing, which loads at any TP, PP and DP whatever it was saved at."""

import threading
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.parameters import Parameters
from megatron.sft.families.weight_names import WeightEntry, weight_entries, whole_parameters
from megatron.sft.runtime.errors import UserError

# The optimizer state in the shape of the parameters, so that it can be loaded in another layout.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


class _InProcessSave(TorchDistSaveShardedStrategy):
    """megatron-core's own layout on disk, written by torch's threads.

    megatron-core's strategy hands the data to processes that it forks, and waits for ever if one of them dies.
    """

    planner: type[MCoreSavePlanner] = MCoreSavePlanner
    threads = 2

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        sharded_state_dict, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(sharded_state_dict, False),
            storage_writer=FileSystemWriter(checkpoint_dir, thread_count=self.threads, overwrite=True),
            planner=self.planner(dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False),
        )


class _StreamingSave(_InProcessSave):
    """Writes meta tensors: each part is fetched from `source` when its turn comes."""

    def __init__(self, source: Parameters, entries: dict[tuple[str, tuple[int, ...]], WeightEntry]) -> None:
        super().__init__("torch_dist", 1)
        lock = threading.Lock()
        # Several parts of one parameter may be written at the same time by different threads; it is read once.
        waiting: Counter[str] = Counter()
        read: dict[str, Future[Tensor]] = {}

        def whole(entry: WeightEntry) -> Tensor:
            name = entry.megatron
            with lock:
                found = read.get(name)
                mine = read.setdefault(name, Future())
                waiting[name] -= 1
                if not waiting[name]:
                    del read[name]
            if found is None:
                try:
                    mine.set_result(source.read(entry))
                except BaseException as error:
                    mine.set_exception(error)
            return mine.result()

        def bound_of(index: Any) -> tuple[WeightEntry, tuple[int, ...]]:
            """The parameter that a part belongs to, and where in it the part begins."""
            lead = index.fqn.count(".layers.") + index.fqn.count(".experts.experts.")
            return entries[index.fqn, tuple(index.offset[:lead])], tuple(index.offset[lead:])

        class Fetch(MCoreSavePlanner):
            def finish_plan(self, new_plan: Any) -> Any:
                waiting.update(bound_of(item.index)[0].megatron for item in new_plan.items)
                return super().finish_plan(new_plan)

            def resolve_data(self, write_item: Any) -> Tensor:
                size = tuple(super().resolve_data(write_item).shape)
                entry, start = bound_of(write_item.index)
                inner = size[len(size) - len(start) :]
                cut = tuple(slice(o, o + s) for o, s in zip(start, inner, strict=True))
                return whole(entry)[cut].reshape(size)

        self.planner = Fetch

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        before = torch.serialization.get_crc32_options()
        # The manifest has checksums of the files.
        torch.serialization.set_crc32_options(False)
        try:
            super().save(sharded_state_dict, checkpoint_dir)
        except CheckpointException as error:
            # torch wraps what a read raised.
            for reason, _ in error.failures.values():
                raise reason from None
            raise
        finally:
            torch.serialization.set_crc32_options(before)


def model_state(model: Any) -> ShardedStateDict:
    """The model's sharded state without the extra states of FP8 layers, which another backend's layers do not have."""
    state: ShardedStateDict = model.sharded_state_dict(metadata=dict(METADATA))  # it adds a process group
    return {key: value for key, value in state.items() if not _is_extra_state(key, value)}


def _is_extra_state(key: str, value: Any) -> bool:
    return key.endswith("_extra_state") or (isinstance(value, ShardedObject) and value.key.endswith("_extra_state"))


def save_parameters(folder: Path, architecture: Architecture, source: Parameters) -> None:
    """Write a whole model from one process with one parameter in memory at a time, into an existing, empty folder.

    megatron-core says from a model without memory what belongs where; each part is fetched when it is written.
    """
    from megatron.sft.model.config import transformer_config
    from megatron.sft.model.gpt import build_model
    from megatron.sft.model.layout import Layout

    whole = Layout()
    with torch.device("meta"):
        model = build_model(architecture, whole, transformer_config(architecture, whole))
    parameters = whole_parameters(model, architecture)
    entries = {}
    for entry in weight_entries(architecture):
        meta, parameter = source.meta(entry), parameters[entry.megatron]
        if meta.shape != parameter.shape:
            raise UserError(
                f"{entry.hf[0]} gives {tuple(meta.shape)} for {entry.megatron}, config.json implies "
                f"{tuple(parameter.shape)}: weights and configuration do not belong together"
            )
        # Keeps the dtype of the source, which may differ from tensor to tensor.
        parameter.data = meta
        entries[entry.stored_key, entry.place] = entry

    strategy = _StreamingSave(source, entries)
    state = model_state(model)
    dist_checkpointing.save(state, str(folder), strategy, content_metadata=METADATA)
