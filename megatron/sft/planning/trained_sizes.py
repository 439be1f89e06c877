"""How many parameters a process trains, and which inputs of linear layers their gradients need."""

from functools import cache
from math import prod

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.lora import factor_shapes
from megatron.sft.families.sizes import weight_shape
from megatron.sft.families.trained import Trained
from megatron.sft.families.weight_names import WeightEntry, weight_entries
from megatron.sft.model.layout import Layout


@cache
def num_trained(architecture: Architecture, trained: Trained) -> int:
    """Parameters of the whole model that are trained."""
    if trained.lora is not None:
        return sum(trained.lora.rank * sum(sizes) for _, _, sizes in factor_shapes(architecture, trained.lora))
    entries = (entry for entry in weight_entries(architecture) if not entry.is_buffer and trained.trains(entry.megatron))
    return sum(prod(weight_shape(architecture, entry.rule)) for entry in entries)


@cache
def stage_trained(architecture: Architecture, layout: Layout, trained: Trained, stage: int) -> tuple[int, int]:
    """Parameters that a process of a pipeline stage trains: those of every data-parallel copy, and those of its experts."""
    dense = expert = 0.0
    here = _layers(architecture, layout, stage)
    if trained.lora is not None:
        rank = trained.lora.rank
        for weight, _, (outputs, inputs) in factor_shapes(architecture, trained.lora):
            entry = weight.entry
            if entry.layer in here:
                # B is split where the layer's outputs are, A where its inputs are.
                split, whole = (outputs, inputs) if entry.rule.tp_dim == 0 else (inputs, outputs)
                size = layout.tensor_parallel if entry.expert is None else layout.expert_tensor_parallel
                count = rank * (split / (size if entry.rule.tp_dim is not None else 1) + whole)
                dense, expert = (dense + count, expert) if entry.expert is None else (dense, expert + count)
        return int(dense), int(expert / layout.expert_parallel)
    for entry in weight_entries(architecture):
        if entry.is_buffer or not trained.trains(entry.megatron) or not _is_here(entry, architecture, layout, stage):
            continue
        size = layout.tensor_parallel if entry.expert is None else layout.expert_tensor_parallel
        count = prod(weight_shape(architecture, entry.rule)) / (size if entry.rule.tp_dim is not None else 1)
        dense, expert = (dense + count, expert) if entry.expert is None else (dense, expert + count)
    return int(dense), int(expert / layout.expert_parallel)


def _layers(architecture: Architecture, layout: Layout, stage: int) -> range:
    sizes = layout.stage_layers(architecture)
    first = sum(sizes[:stage])
    return range(first, first + sizes[stage])


def _is_here(entry: WeightEntry, architecture: Architecture, layout: Layout, stage: int) -> bool:
    if entry.layer is not None:
        return entry.layer in _layers(architecture, layout, stage)
    last = stage == layout.pipeline_parallel - 1
    if entry.megatron.startswith("embedding."):
        return stage == 0 or (last and architecture.tied_embeddings)
    return last


def unkept_inputs(architecture: Architecture, trained: Trained) -> frozenset[str]:
    """Names in `memory.layer_tensors` that no gradient needs: inputs of frozen linear layers without adapters."""
    if trained.lora is None:
        return frozenset()  # FREEZE by layers: taken as trained
    read_by = {
        "attention norm": ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa"),
        "normed vectors": ("q_b_proj", "kv_b_proj"),
        "MLP norm": ("gate_proj", "up_proj", "gate_up_proj"),
        "activation": ("down_proj",),
    }
    inside = architecture.moe is not None and not trained.lora.experts
    names = {
        name
        for name, readers in read_by.items()
        if not set(readers) & set(trained.lora.targets) or (inside and name in ("MLP norm", "activation"))
    }
    return frozenset(names)
