"""The weights of a whole model, one entry per Megatron parameter: the family's table with layers and experts filled in.

Both sides are checked for completeness: every parameter and every Hugging Face tensor must be in the table.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from megatron.sft.families.architecture import ATTENTION, GATED_DELTA_NET, LATENT_ATTENTION, Architecture, Layer
from megatron.sft.families.registry import family_rules, layer_rules
from megatron.sft.families.rules import Buffer, Rule
from megatron.sft.runtime.errors import UserError

# Names of live modules -> names of the tables: norms, which are separate modules without Transformer Engine (the one before
# experts is a module everywhere), experts as modules, and experts whose matrices lie in one module.
INPUT_NORM = {
    ATTENTION: ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    GATED_DELTA_NET: ("input_layernorm.", "self_attention.in_proj.layer_norm_"),
    LATENT_ATTENTION: ("input_layernorm.", "input_layernorm."),
}
MLP_NORM = ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
_LOCAL_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")
_GROUPED_EXPERT = re.compile(r"\.experts\.(linear_fc[12])\.weight(\d+)$")
_LAYER = re.compile(r"(?<=decoder\.layers\.)(\d+)\.")
_EXPERT = re.compile(r"(?<=\.experts\.experts\.)(\d+)\.")
# Tensors of older Hugging Face folders that can be computed from config.json.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class WeightEntry:
    """A rule applied to one layer and expert, or to the weights outside the layers: full names on both sides."""

    rule: Rule
    megatron: str
    hf: tuple[str, ...]
    layer: int | None = None
    expert: int | None = None
    stacked: bool = True

    @property
    def stored_key(self) -> str:
        """The tensor's name in a distributed checkpoint: without layer and expert, which are indices in the tensor.

        Where layers do not have the same weights (not `stacked`), each is its own tensor.
        """
        return _EXPERT.sub("", _LAYER.sub("", self.megatron) if self.stacked else self.megatron)

    @property
    def is_buffer(self) -> bool:
        """True if it is not trained and keeps its dtype."""
        return isinstance(self.rule, Buffer)

    @property
    def place(self) -> tuple[int, ...]:
        """The parameter's leading indices in the stored tensor: () or (layer,) or (layer, expert)."""
        return tuple(index for index in (self.layer if self.stacked else None, self.expert) if index is not None)


def weight_entries(architecture: Architecture) -> Iterator[WeightEntry]:
    """Every parameter of the whole model: those outside the layers first, then layer by layer."""
    for rule in (rule for rule in family_rules(architecture) if "{layer}" not in rule.megatron):
        yield WeightEntry(rule, rule.megatron, rule.hf)
    num_experts = architecture.moe.num_experts if architecture.moe else 0
    stacked = not architecture.layers_differ
    rules: dict[Layer, tuple[Rule, ...]] = {kind: layer_rules(architecture, kind) for kind in set(architecture.layers)}
    for layer, kind in enumerate(architecture.layers):
        for rule in rules[kind]:
            for expert in range(num_experts) if "{expert}" in rule.megatron else (None,):
                names = tuple(name.format(layer=layer, expert=expert) for name in rule.hf)
                yield WeightEntry(rule, rule.megatron.format(layer=layer, expert=expert), names, layer, expert, stacked)


def norm_names(layer: Layer) -> dict[str, str]:
    """Modules of norms in such a layer -> what they are called in a checkpoint, both with the point before `weight`."""
    return dict((INPUT_NORM[layer.mixer],) if layer.experts else (INPUT_NORM[layer.mixer], MLP_NORM))


def checkpoint_name(module_name: str, architecture: Architecture, first_layer: int = 0, first_expert: int = 0) -> str:
    """The table's name of a live parameter. `first_layer`, `first_expert`: of this process, counted over the whole model."""
    in_layer = _LAYER.search(module_name)
    if in_layer:
        for separate, fused in norm_names(architecture.layers[int(in_layer[1]) + first_layer]).items():
            if module_name.endswith(f".{separate}weight"):
                module_name = module_name.removesuffix(f"{separate}weight") + f"{fused}weight"
    module_name = _LOCAL_EXPERT.sub(lambda m: f".experts.experts.{int(m[1]) + first_expert}.", module_name)
    module_name = _GROUPED_EXPERT.sub(lambda m: f".experts.experts.{int(m[2]) + first_expert}.{m[1]}.weight", module_name)
    return _LAYER.sub(lambda match: f"{int(match[1]) + first_layer}.", module_name)


def checked_to_megatron(entry: WeightEntry, architecture: Architecture, tensors: list[Tensor], where: str) -> Tensor:
    """The Megatron parameter made of Hugging Face tensors; a `UserError` if their shapes do not fit. `where`: the folder."""
    try:
        return entry.rule.to_megatron(architecture, *tensors)
    except RuntimeError:
        sizes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip(entry.hf, tensors, strict=True))
        raise UserError(f"{where}: {sizes}: weights and configuration do not belong together") from None


def check_hf_names(architecture: Architecture, names: set[str], where: str) -> list[str]:
    """Compare the names of a Hugging Face folder's tensors with the table; returns those that need not be converted.

    A missing or unknown tensor is a `UserError`. `where`: the folder, for the message.
    """
    expected = {name for entry in weight_entries(architecture) for name in entry.hf}
    skipped = sorted(name for name in names - expected if _COMPUTED.search(name))
    if architecture.tied_embeddings and "lm_head.weight" in names:
        skipped.append("lm_head.weight")
    missing, unknown = expected - names, names - expected - set(skipped)
    if missing == {"lm_head.weight"} and not unknown:
        raise UserError(
            f"{where}: lm_head.weight is missing, and config.json does not tie the output layer to the embedding: download the "
            "model again or, if it was saved without lm_head.weight because they are tied, set tie_word_embeddings to true"
        )
    if missing and unknown:
        raise UserError(
            f"{where}: {len(missing)} tensors are missing, {min(missing)} among them, and {len(unknown)} are not known for "
            f"{architecture.family}, {min(unknown)} among them: give the weights the names that transformers saves, or take "
            "the config.json that belongs to them"
        )
    if missing:
        raise UserError(f"{where}: {len(missing)} tensors are missing, {min(missing)} among them: download the model again")
    if unknown:
        raise UserError(
            f"{where}: {len(unknown)} tensors are not known for {architecture.family}, {min(unknown)} among them: "
            "the model does not have the architecture that its config.json names"
        )
    return skipped
