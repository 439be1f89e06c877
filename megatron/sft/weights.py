"""Weights between Hugging Face and Megatron names, by the family's table, with nothing left over on either side."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from megatron.sft.errors import UserError
from megatron.sft.families import rules_of
from megatron.sft.families.rules import Rule, Shape

# The names of separate norms in the model built without Transformer Engine, and of the same weights in checkpoints.
_SEPARATE_NORMS = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}
_LAYER = re.compile(r"(?<=\.layers\.)(\d+)(?=\.)")
# Tensors of older Hugging Face folders that can be computed from config.json.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class BoundRule:
    """A rule for one layer (or for the model's outer weights): names filled in."""

    rule: Rule
    megatron: str
    hf: tuple[str, ...]


def bound_rules(shape: Shape) -> Iterator[BoundRule]:
    """Every parameter of the whole model, in the order of Hugging Face's layers."""
    rules = rules_of(shape)
    for rule in (rule for rule in rules if "{}" not in rule.megatron):
        yield BoundRule(rule, rule.megatron, rule.hf)
    for layer in range(shape.num_layers):
        for rule in (rule for rule in rules if "{}" in rule.megatron):
            yield BoundRule(rule, rule.megatron.format(layer), tuple(name.format(layer) for name in rule.hf))


def checkpoint_name(module_name: str, first_layer: int = 0) -> str:
    """A live parameter's name as the tables spell it: fused norm names, layers counted over all pipeline stages."""
    for separate, fused in _SEPARATE_NORMS.items():
        if module_name.endswith(separate):
            module_name = module_name.removesuffix(separate) + fused
    return _LAYER.sub(lambda match: str(int(match[0]) + first_layer), module_name)


def whole_parameters(model: nn.Module, shape: Shape) -> dict[str, nn.Parameter]:
    """The parameters of an unsplit model by their names in the table. Both sides must hold the same names."""
    parameters = {checkpoint_name(name): parameter for name, parameter in model.named_parameters()}
    expected = {bound.megatron for bound in bound_rules(shape)}
    assert parameters.keys() == expected, parameters.keys() ^ expected
    return parameters


def check_hf_names(shape: Shape, names: set[str], where: str) -> list[str]:
    """Compare the tensors of a Hugging Face folder with the table; returns the ones that may be passed over.

    A missing or unknown tensor is a `UserError`.
    """
    expected = {name for bound in bound_rules(shape) for name in bound.hf}
    passed_over = sorted(name for name in names - expected if _COMPUTED.search(name))
    if shape.tied_embeddings and "lm_head.weight" in names:
        passed_over.append("lm_head.weight")
    missing, unknown = expected - names, names - expected - set(passed_over)
    if missing:
        raise UserError(
            f"{where}: {len(missing)} tensors are missing, {min(missing)} among them: download the model again"
        )
    if unknown:
        raise UserError(
            f"{where}: {len(unknown)} tensors are not known for {shape.family}, {min(unknown)} among them: "
            "this model is not of the architecture that its config.json names"
        )
    return passed_over
