"""Rotary positions: base and scaling in config.json, in transformers' old and new spelling, and the frequencies they give.

A further scaling is a case of `_scaling` and of `inverse_frequencies`. The formulas are those of transformers'
ROPE_INIT_FUNCTIONS, which the tests compare with.
"""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from megatron.sft.families.architecture import Rope, RopeScaling
from megatron.sft.runtime.errors import UserError

# rope_type -> the parameters it cannot do without.
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "proportional": (),
    "ntk_alpha": ("alpha",),
}
_KNOWN = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    "short_factor", "long_factor",
}  # fmt: skip
# Parameters that transformers reads nowhere. `mrope_…`: where a text's three positions differ, which they never do.
UNREAD = {"attn_factor", "mrope_section", "mrope_interleaved", "max_position_embeddings", "finetuned"}
KINDS = tuple(_NEEDED)


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes rope_parameters, older versions rope_theta and an optional rope_scaling: one form of both."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    for field in ("rope_theta", "partial_rotary_factor"):
        if parameters.get(field) is None and config.get(field) is not None:
            parameters[field] = config[field]
    return parameters


def read_rope(
    parameters: dict[str, Any], config: dict[str, Any], head_dim: int, where: str, others: Collection[str] = ()
) -> Rope:
    """The rotation that these `parameters` of a config.json describe; an unknown type or parameter is a `UserError`.

    others: parameters that the family knows besides: `alpha`, `llama_4_scaling_beta`.
    """
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    if kind == "dynamic" and parameters.get("alpha") and "alpha" in others:
        kind = "ntk_alpha"  # a fixed factor, whatever the length
    if kind not in _NEEDED:
        raise UserError(f"{where}: RoPE scaling of type {kind!r} is not supported: choose one of {', '.join(_NEEDED)}")
    for field in sorted(parameters.keys() - _KNOWN - UNREAD - set(others)):
        raise UserError(f"{where}: the RoPE parameter {field}={parameters[field]!r} is not supported")
    for field in _NEEDED[kind]:
        if parameters.get(field) is None:
            raise UserError(f"{where}: RoPE scaling of type {kind!r} lacks {field}: is it the model's own config.json?")
    share = float(parameters.get("partial_rotary_factor") or 1.0)
    dim = head_dim if kind == "proportional" else int(head_dim * share)
    # The default of transformers' LlamaConfig, which configs that predate the field rely on.
    theta = 10000.0 if parameters.get("rope_theta") is None else float(parameters["rope_theta"])
    if not 0 < share <= 1 or dim % 2 or dim < 2 or theta <= 1:
        raise UserError(f"{where}: RoPE of {dim} of {head_dim} dimensions with base {theta:g} is not possible")
    beta = float(parameters.get("llama_4_scaling_beta") or 0.0)
    original = _original(parameters, config)
    if kind == "ntk_alpha":
        return Rope(theta * float(parameters["alpha"]) ** (dim / (dim - 2)), dim)
    scaling = None if kind == "default" else _scaling(kind, parameters, config, where)
    if scaling and kind == "longrope" and {len(scaling.short), len(scaling.long)} != {dim // 2}:
        raise UserError(
            f"{where}: longrope has {len(scaling.short)} short and {len(scaling.long)} long factors, "
            f"a head has {dim // 2} rotated pairs of dimensions"
        )
    factor = _attention_factor(scaling, parameters) if scaling else 1.0
    return Rope(theta, dim, factor, scaling, beta, original if beta else 0)


def _original(parameters: dict[str, Any], config: dict[str, Any]) -> int:
    """Phi-3 has it next to the RoPE parameters, where it counts more than among them; else all positions are original."""
    found = config.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    return int(found or config["max_position_embeddings"])


def _scaling(kind: str, parameters: dict[str, Any], config: dict[str, Any], where: str) -> RopeScaling:
    maximum, original = int(config["max_position_embeddings"]), _original(parameters, config)
    factor = parameters.get("factor")
    if factor is None:
        factor = maximum / original if kind in ("yarn", "longrope") else 1.0
    if kind == "llama3":
        low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    else:
        low, high = float(parameters.get("beta_slow") or 1), float(parameters.get("beta_fast") or 32)
    possible = float(factor) > 0 if kind == "proportional" else float(factor) >= 1
    # Kimi K2 has YaRN's two alike: a step in place of a ramp.
    ordered = 0 < low < high or (kind != "llama3" and 0 < low == high)
    if not (possible and ordered and original > 1):
        raise UserError(f"{where}: RoPE scaling with factor {factor}, frequencies {low} to {high} is not possible")
    return RopeScaling(
        kind,
        float(factor),
        maximum if kind == "dynamic" else original,
        low,
        high,
        bool(parameters.get("truncate", True)),
        float(parameters.get("partial_rotary_factor") or 1.0),
        tuple(map(float, parameters.get("short_factor") or ())) if kind == "longrope" else (),
        tuple(map(float, parameters.get("long_factor") or ())) if kind == "longrope" else (),
    )


def _attention_factor(scaling: RopeScaling, parameters: dict[str, Any]) -> float:
    """What cosines and sines are multiplied by: YaRN's and LongRoPE's correction of the attention's temperature."""
    given = parameters.get("attention_factor")
    if scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if given is not None:
        return float(given)
    if scaling.kind == "longrope":
        grown = math.log(scaling.factor) / math.log(scaling.original)
        return 1.0 if scaling.factor <= 1 else math.sqrt(1 + grown)
    one, other = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if one and other:
        return _yarn_factor(scaling.factor, one) / _yarn_factor(scaling.factor, other)
    return _yarn_factor(scaling.factor, 1.0)


def _yarn_factor(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def inverse_frequencies(rope: Rope, device: torch.device, lengths: Tensor | None = None) -> Tensor:
    """[dim / 2] float32: radians by which each pair of dimensions turns from one position to the next.

    lengths [t]: of each token's conversation, for scalings that depend on it; the result is [t, dim / 2] then.
    """
    pairs = torch.arange(0, rope.dim, 2, dtype=torch.float32, device=device) / rope.dim
    frequencies = 1.0 / (rope.theta**pairs)
    scaling = rope.scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    if scaling.kind == "yarn":
        return _yarn(frequencies, rope, scaling)
    if scaling.kind == "proportional":
        rotated = torch.arange(len(pairs), device=device) < int(scaling.share * rope.dim // 2)
        return frequencies * rotated / scaling.factor
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    assert lengths is not None, "frequencies of this scaling depend on the length of a conversation"
    if scaling.kind == "longrope":
        short, long = (torch.tensor(factors, device=device) for factors in (scaling.short, scaling.long))
        return torch.where((lengths > scaling.original)[:, None], frequencies / long, frequencies / short)
    # As a model of transformers that sees this conversation first: from the largest position on, the base grows with it.
    grown = lengths.clamp(min=scaling.original).to(torch.float32) / scaling.original
    base = rope.theta * (scaling.factor * grown - (scaling.factor - 1)) ** (rope.dim / (rope.dim - 2))
    return 1.0 / (base[:, None] ** pairs)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Meta's Llama 3.1: wavelengths shorter than original / high positions keep their frequency, those longer than
    original / low have it divided by `factor`, and frequencies between them are interpolated."""
    turns = scaling.original * frequencies / (2 * math.pi)
    kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _yarn(frequencies: Tensor, rope: Rope, scaling: RopeScaling) -> Tensor:
    """YaRN (arXiv 2309.00071): pairs that turn more than `high` times within the original positions keep their frequency, those
    that turn less than `low` times have it divided by `factor`, and a ramp over the pairs' numbers lies between."""

    def pair_of(turns: float) -> float:
        return rope.dim * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_of(scaling.high), pair_of(scaling.low)
    if scaling.truncated:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    numbers = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
    divided = ((numbers - first) / (last - first if last != first else 0.001)).clamp(0, 1)
    return frequencies / scaling.factor * divided + frequencies * (1 - divided)
