"""The model chunks of a process as one part of a checkpoint, in which layers have the names that they have without chunks."""

from collections.abc import Sequence
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from megatron.sft.checkpoint import torch_dist


def model_state(chunks: Sequence[Any]) -> ShardedStateDict:
    """The sharded state of all chunks. Only this process sees the entries' keys; what is stored has global layer numbers."""
    return {
        f"{number}.{key}": value
        for number, chunk in enumerate(chunks)
        for key, value in torch_dist.model_state(chunk).items()
    }


def load_model_state(chunks: Sequence[Any], loaded: dict[str, Any]) -> None:
    """Fill the chunks from what a checkpoint gave for `model_state`."""
    for number, chunk in enumerate(chunks):
        prefix = f"{number}."
        part = {key.removeprefix(prefix): value for key, value in loaded.items() if key.startswith(prefix)}
        missing, _ = chunk.load_state_dict(part, strict=False)
        missing = [name for name in missing if not name.endswith("_extra_state")]
        assert not missing, missing
