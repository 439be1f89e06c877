"""The `torch_dist` format: megatron-core's dist_checkpointing, which loads at any TP, PP and DP whatever it was saved at."""

import io
import pickle
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import FileSystemWriter

from megatron.sft.errors import UserError

# The optimizer state in the shape of the parameters, so that it can be loaded in another layout.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}

# The only names that the pickled .metadata of a checkpoint may call for.
_METADATA_GLOBALS: dict[str, set[str] | None] = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "StorageMeta"},
    "torch.distributed.checkpoint.planner": {"WriteItem", "WriteItemType", "SavePlan", "TensorWriteData"},
    "torch": {"Size", "device", "strided", "bfloat16", "bool", "uint8", "float8_e4m3fn", "float8_e5m2"}
    | {f"{kind}{bits}" for kind in ("float", "int") for bits in (8, 16, 32, 64)},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset", "dict", "list", "tuple", "slice", "bytearray"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "_codecs": {"encode"},
}


class _InProcessSave(TorchDistSaveShardedStrategy):
    """megatron-core's own layout on disk, written by torch's threads.

    megatron-core's strategy hands the data to processes that it forks, and waits for ever if one of them dies.
    """

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        sharded_state_dict, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(sharded_state_dict, False),
            storage_writer=FileSystemWriter(checkpoint_dir, thread_count=2, overwrite=True),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
        )


def model_state(model: Any) -> ShardedStateDict:
    """The model's sharded state without the extra states of FP8 layers, which another backend's layers do not have."""
    state: ShardedStateDict = model.sharded_state_dict(metadata=METADATA)
    return {key: value for key, value in state.items() if not _is_extra_state(key, value)}


def _is_extra_state(key: str, value: Any) -> bool:
    return key.endswith("_extra_state") or (isinstance(value, ShardedObject) and value.key.endswith("_extra_state"))


def save(folder: Path, state: ShardedStateDict) -> None:
    """Write a sharded state from all processes into an existing, empty folder."""
    dist_checkpointing.save(state, str(folder), _InProcessSave("torch_dist", 1), content_metadata=METADATA)


def load(folder: Path, state: ShardedStateDict) -> dict[str, Any]:
    """Read what `state` asks for, in this run's layout; a parameter that the checkpoint lacks is a `UserError`."""
    _check_metadata(folder)
    # In megatron-core's words an entry that the checkpoint lacks is unexpected.
    loaded, _, lacking = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RETURN_UNEXPECTED)
    if lacking:
        raise UserError(
            f"{folder} lacks {len(lacking)} entries, {sorted(lacking)[0]} among them: convert the model again"
        )
    result: dict[str, Any] = loaded
    return result


def stored_keys(folder: Path) -> set[str]:
    """Names of the tensors in a checkpoint, the layers' ones once for all layers."""
    _check_metadata(folder)
    return set(dist_checkpointing.load_tensors_metadata(str(folder)))


class _MetadataCheck(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        names = _METADATA_GLOBALS.get(module, set())
        if names is None or name in names:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _check_metadata(folder: Path) -> None:
    """torch reads .metadata with plain pickle, which can run any code: read it here first with a short list of names."""
    path = folder / ".metadata"
    try:
        _MetadataCheck(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the checkpoint is not whole, take another one") from None
    except Exception as error:
        raise UserError(f"{path} is damaged or not to be trusted ({error}): take another checkpoint") from None
