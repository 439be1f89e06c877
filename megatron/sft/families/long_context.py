"""Extending a model's context oneself: its config.json with a scaling of rotary positions that it did not come with."""

from dataclasses import dataclass
from typing import Any

from megatron.sft.families.config_fields import text_fields
from megatron.sft.families.layers import FULL
from megatron.sft.families.rope import rope_parameters
from megatron.sft.runtime.errors import UserError

# Scalings that a factor says all of.
KINDS = ("yarn", "linear", "dynamic")


@dataclass(frozen=True)
class RopeExtension:
    """kind: one of KINDS. original: positions that the model was trained on; None: its max_position_embeddings."""

    kind: str
    factor: float
    original: int | None = None


def extended_config(config: dict[str, Any], extension: RopeExtension | None, where: str) -> dict[str, Any]:
    """config.json with the scaling, in the spelling it has, and for `factor` times as many positions.

    A `UserError` where it has a scaling already. `where` names the file in messages.
    """
    if extension is None:
        return config
    if extension.factor <= 1:
        raise UserError(f"ROPE_FACTOR={extension.factor:g} does not extend anything: give a factor above 1")
    text = dict(text_fields(config))
    maximum = text.get("max_position_embeddings")
    if not isinstance(maximum, int):
        raise UserError(f"{where} has no max_position_embeddings, from which ROPE_SCALING would extend: add it to the file")
    nested = isinstance((text.get("rope_parameters") or {}).get(FULL), dict)
    before = text["rope_parameters"][FULL] if nested else rope_parameters(text)
    kind = before.get("rope_type", before.get("type", "default"))
    if kind != "default":
        raise UserError(f"{where} has RoPE scaling of type {kind!r} already: convert without ROPE_SCALING, or edit the file")
    original = extension.original or maximum
    scaling: dict[str, Any] = {"rope_type": extension.kind, "factor": extension.factor}
    if extension.kind == "yarn":
        scaling["original_max_position_embeddings"] = original
    if nested:
        text["rope_parameters"] = {**text["rope_parameters"], FULL: {**before, **scaling}}
    elif text.get("rope_parameters"):
        text["rope_parameters"] = {**text["rope_parameters"], **scaling}
    else:
        text["rope_scaling"] = scaling
    # `dynamic` takes this number for the original one.
    text["max_position_embeddings"] = original if extension.kind == "dynamic" else int(original * extension.factor)
    return {**config, "text_config": text} if "text_config" in config else text
