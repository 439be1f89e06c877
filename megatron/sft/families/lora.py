"""LoRA as settings: which projections of a model get an adapter, and the adapter's names in PEFT's folders.

The output of an adapted projection is `base(x) + B(A(dropout(x))) * scale`, with A [rank, inputs] and B [outputs, rank]
for each of Hugging Face's projections, as in PEFT (Hu et al., 2021).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.registry import family_rules
from megatron.sft.families.rules import InterleavedGateUp, Rule, Transposed
from megatron.sft.families.sizes import weight_shape
from megatron.sft.families.weight_names import WeightEntry, weight_entries
from megatron.sft.runtime.errors import UserError

# The linear layers of a decoder layer, by the end of their names in a family's table, and the word for all of a kind.
_WORDS = ("attention", "mlp", "experts")
_ATTENTION = (
    ".linear_qkv.weight", ".linear_proj.weight", ".in_proj.weight", ".out_proj.weight", ".linear_down.weight",
    ".linear_q_up.weight", ".linear_kv_up.weight",
)  # fmt: skip
_LINEAR = (*_ATTENTION, ".linear_fc1.weight", ".linear_fc2.weight")
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoRA:
    """Rank, scale and place of a run's adapters. `targets`: last parts of the names of Hugging Face's modules, sorted.

    experts: the experts' projections have adapters too (of the same names).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    experts: bool = False
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski, 2023)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class AdaptedWeight:
    """A linear layer's weight with the projections in it that have adapters: places in `entry.hf`."""

    entry: WeightEntry
    projections: tuple[int, ...]

    def module(self, projection: int) -> str:
        """Hugging Face's module of a projection: `model.layers.3.self_attn.q_proj`."""
        return self.entry.hf[projection].removesuffix(".weight")


def kind_of(rule: Rule) -> str:
    """`attention`, `mlp` or `experts` for the weight of a linear layer in a decoder layer, else an empty string."""
    if "{layer}" not in rule.megatron or not rule.megatron.endswith(_LINEAR):
        return ""
    if isinstance(rule, InterleavedGateUp | Transposed):
        return ""  # PEFT has its own form of adapters for such tensors
    if "{expert}" in rule.megatron:
        return "experts"
    return "attention" if ".self_attention." in rule.megatron else "mlp"


def chosen_targets(architecture: Architecture, text: str) -> tuple[tuple[str, ...], bool]:
    """The modules that LORA_TARGETS names, and whether experts are among them.

    `all` is attention and the dense MLP. An unknown word, and a choice that is empty for this model, is a `UserError`.
    """
    modules: dict[str, list[str]] = {word: [] for word in _WORDS}
    for rule in family_rules(architecture):
        if kind := kind_of(rule):
            modules[kind] += [name.removesuffix(".weight").rpartition(".")[2] for name in rule.hf]
    dense = modules["attention"] + modules["mlp"]
    known = {"all": dense, "attention": modules["attention"], "mlp": modules["mlp"], "experts": modules["experts"]}
    words = [word for word in text.replace(",", " ").split() if word]
    chosen: set[str] = set()
    for word in words:
        names = known.get(word, [word] if word in dense else [])
        if not names:
            experts = f"; {word} is a part of experts: name them by the word experts" if word in modules["experts"] else ""
            possible = [name for name, those in known.items() if those] + sorted(set(dense))
            raise UserError(
                f"LORA_TARGETS={text!r}: {architecture.family} has no {word!r} that adapters are built for{experts}: "
                f"take some of {', '.join(possible)}"
            )
        chosen.update(names)
    if not chosen:
        raise UserError(f"LORA_TARGETS={text!r} names nothing: take all, attention, mlp, experts, or names such as q_proj")
    return tuple(sorted(chosen)), "experts" in words


def adapted_weights(architecture: Architecture, lora: LoRA) -> Iterator[AdaptedWeight]:
    """Every linear layer of the whole model that has an adapter, layer by layer."""
    for entry in weight_entries(architecture):
        if weight := adapted_weight(entry, lora):
            yield weight


def adapted_weight(entry: WeightEntry, lora: LoRA) -> AdaptedWeight | None:
    """The adapters of one weight, None if it has none."""
    kind = kind_of(entry.rule)
    if not kind or (kind == "experts" and not lora.experts):
        return None
    names = [name.removesuffix(".weight").rpartition(".")[2] for name in entry.hf]
    places = tuple(place for place, name in enumerate(names) if name in lora.targets)
    return AdaptedWeight(entry, places) if places else None


def peft_names(module: str) -> tuple[str, str]:
    """The names of A and B of one of Hugging Face's modules, in PEFT's folders and in our checkpoints."""
    return f"{PEFT_PREFIX}{module}.lora_A.weight", f"{PEFT_PREFIX}{module}.lora_B.weight"


def factor_shapes(architecture: Architecture, lora: LoRA) -> Iterator[tuple[AdaptedWeight, int, tuple[int, int]]]:
    """(weight, place of a projection in it, its outputs and inputs): A is [rank, inputs], B [outputs, rank]."""
    for weight in adapted_weights(architecture, lora):
        whole = torch.empty(weight_shape(architecture, weight.entry.rule), device="meta")
        parts = weight.entry.rule.to_hf(architecture, whole)
        for place in weight.projections:
            outputs, inputs = parts[place].shape
            yield weight, place, (outputs, inputs)
