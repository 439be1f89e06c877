"""The parameters of a live model with their lines of the family's table."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state
from torch import Tensor, nn

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.weight_names import WeightEntry, checkpoint_name, weight_entries
from megatron.sft.model.layout import Layout

_ADAPTER = ".adapter."
# Ends of the names of buffers that belong to the model's weights.
BUFFERS = (".mlp.router.expert_bias",)


def is_adapter(name: str) -> bool:
    """Whether a name within the model is of an adapter's parameter."""
    return _ADAPTER in name


@dataclass(frozen=True)
class LiveWeight:
    """A weight of the table in this process.

    name: of the parameter, or buffer, within the model. values: the part of it that this is; it may hold several experts.
    """

    name: str
    parameter: nn.Parameter | Tensor
    values: Tensor
    entry: WeightEntry


def live_weights(model: Any, architecture: Architecture, layout: Layout) -> Iterator[LiveWeight]:
    """This process's weights; adapters are not among them.

    The last pipeline stage's copy of a tied embedding comes with the embedding's line.
    """
    entries = {entry.megatron: entry for entry in weight_entries(architecture)}
    experts = architecture.moe.num_experts // layout.expert_parallel if architecture.moe else 0
    first_layer = model.decoder.layers[0].layer_number - 1
    first_expert = experts * parallel_state.get_expert_model_parallel_rank()
    buffers = (pair for pair in model.named_buffers() if pair[0].endswith(BUFFERS))
    for live_name, parameter in itertools.chain(model.named_parameters(), buffers):
        if is_adapter(live_name):
            continue
        name = checkpoint_name(live_name, architecture, first_layer)
        if ".mlp.experts." in name:
            for index, values in enumerate(parameter.detach().unbind(0)):
                expert = name.replace(".mlp.experts.", f".mlp.experts.experts.{first_expert + index}.")
                yield LiveWeight(live_name, parameter, values, entries[expert])
            continue
        if name not in entries and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        yield LiveWeight(live_name, parameter, parameter.detach(), entries[name])


def whole_weights(model: Any, architecture: Architecture) -> dict[str, Tensor]:
    """The weights of an unsplit model by the table's names. The model must have exactly the weights of the table."""
    found = {weight.entry.megatron: weight.values for weight in live_weights(model, architecture, Layout())}
    expected = {entry.megatron for entry in weight_entries(architecture)}
    assert found.keys() == expected, sorted(found.keys() ^ expected)[:10]
    return found
