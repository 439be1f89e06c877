"""transformers 5's form of experts on disk: one tensor [experts, …] for all experts of a layer instead of one for each.

`gate_up_proj` holds each expert's gate and up projections, one below the other, `down_proj` its down projection. A family's
table has one tensor for each expert; this gives the same weights in the fused form. gpt-oss has no other form: its table has
parts of the fused tensors, and of their biases.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.registry import module_names
from megatron.sft.families.weight_names import weight_entries

_FUSED = re.compile(r"\.(\w+)\.experts\.gate_up_proj$")
_EXPERT = re.compile(r"^(.+\.)(\w+)\.experts\.\d+\.")


@dataclass(frozen=True)
class FusedExperts:
    """tensors: fused name -> the table's names of each expert's parts. renamed: the table's names of the layers' other tensors
    in the block of the experts (the router) -> their names in this form."""

    tensors: dict[str, tuple[tuple[str, ...], ...]]
    renamed: dict[str, str]


def fused_block(names: Iterable[str]) -> str | None:
    """The module that holds the experts (`mlp` in transformers 5), if these tensors have fused experts."""
    return next((found[1] for name in names if (found := _FUSED.search(name))), None)


def fused_experts(architecture: Architecture, block: str) -> FusedExperts:
    """The fused form of a model with experts; `block`: see `fused_block`."""
    tensors: dict[str, tuple[tuple[str, ...], ...]] = {}
    entries = list(weight_entries(architecture))
    blocks = set()
    for entry in (entry for entry in entries if entry.expert is not None):
        found = _EXPERT.match(entry.hf[0])
        assert found is not None, entry.hf
        blocks.add(f"{found[1]}{found[2]}.")
        part = entry.hf[0][found.end() :]
        if part.endswith(".weight"):
            part = "gate_up_proj" if len(entry.hf) == 2 else "down_proj"
        fused = f"{found[1]}{block}.experts.{part}"
        tensors[fused] = (*tensors.get(fused, ()), entry.hf)
    renamed = {}
    buffer = module_names(architecture.family)["fused_correction_bias"]
    for entry in (entry for entry in entries if entry.expert is None):
        for name, prefix in itertools.product(entry.hf, blocks):
            if name.startswith(prefix):
                layer = prefix.removesuffix(".").rpartition(".")[0]
                renamed[name] = f"{layer}.{block}.{buffer if entry.is_buffer and buffer else name.removeprefix(prefix)}"
    return FusedExperts(tensors, renamed)


def fused(form: FusedExperts, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by the table's names, in its order, in the fused form. The experts of one layer are in memory at a time."""
    fused_names = {name: fused for fused, experts in form.tensors.items() for names in experts for name in names}
    waiting: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name not in fused_names:
            yield form.renamed.get(name, name), tensor
            continue
        waiting[name] = tensor
        experts = form.tensors[fused_names[name]]
        if name == experts[-1][-1]:
            yield (fused_names[name], torch.stack([torch.cat([waiting.pop(part) for part in names]) for names in experts]))
