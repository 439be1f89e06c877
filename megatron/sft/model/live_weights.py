"""The parameters of a live model with their lines of the family's table."""

from collections.abc import Iterator
from typing import Any

from megatron.core import parallel_state
from torch import nn

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.weight_names import WeightEntry, checkpoint_name, weight_entries
from megatron.sft.model.layout import Layout

_ADAPTER = ".adapter."


def is_adapter(name: str) -> bool:
    """Whether a name within the model is of an adapter's parameter."""
    return _ADAPTER in name


def live_weights(model: Any, architecture: Architecture, layout: Layout) -> Iterator[tuple[str, nn.Parameter, WeightEntry]]:
    """(name within the model, parameter, line of the table) of this process's weights; adapters are not among them.

    The last pipeline stage's copy of a tied embedding comes with the embedding's line.
    """
    entries = {entry.megatron: entry for entry in weight_entries(architecture)}
    experts = architecture.moe.num_experts // layout.expert_parallel if architecture.moe else 0
    first_layer = model.decoder.layers[0].layer_number - 1
    first_expert = experts * parallel_state.get_expert_model_parallel_rank()
    for live_name, parameter in model.named_parameters():
        if is_adapter(live_name):
            continue
        name = checkpoint_name(live_name, architecture, first_layer, first_expert)
        if name not in entries and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        yield live_name, parameter, entries[name]
