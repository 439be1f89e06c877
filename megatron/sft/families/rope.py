"""Rotary positions: base and scaling in config.json, in transformers' old and new spelling, and the frequencies they give.

A further scaling is a case of `read_rope`, a record in architecture.py and a case of `inverse_frequencies`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from megatron.sft.families.architecture import Architecture, RopeScaling
from megatron.sft.runtime.errors import UserError

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_KNOWN = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_LLAMA3}


def read_rope(config: dict[str, Any], where: str, kinds: set[str]) -> tuple[float, RopeScaling | None]:
    """The base and the scaling. `kinds`: the family's rope_types; another one, or an unknown parameter, is a `UserError`."""
    # transformers 5 writes rope_parameters, older versions rope_theta and an optional rope_scaling.
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default" and kind not in kinds:
        raise UserError(f"{where}: RoPE scaling of type {kind!r} is not supported")
    for field in sorted(parameters.keys() - _KNOWN):
        raise UserError(f"{where}: the RoPE parameter {field}={parameters[field]!r} is not supported")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor={parameters['partial_rotary_factor']!r} is not supported (only 1.0)")
    theta = parameters.get("rope_theta", config.get("rope_theta"))
    # The default of transformers' LlamaConfig, which configs that predate the field rely on.
    theta = 10000.0 if theta is None else float(theta)
    if kind == "default":
        return theta, None
    missing = [field for field in _LLAMA3 if field not in parameters]
    if missing:
        raise UserError(f"{where}: RoPE scaling of type {kind!r} lacks {missing[0]}: is it the model's own config.json?")
    factor, low, high, positions = (parameters[field] for field in _LLAMA3)
    if not (float(factor) >= 1 and 0 < float(low) < float(high) and int(positions) > 0):
        raise UserError(f"{where}: RoPE scaling with factor {factor}, frequencies {low} to {high} is not possible")
    return theta, RopeScaling(float(factor), float(low), float(high), int(positions))


def inverse_frequencies(architecture: Architecture, device: torch.device) -> Tensor:
    """[head_dim / 2] float32: radians by which each pair of dimensions turns from one position to the next.

    With `llama3` scaling (the formula of Meta's Llama 3.1 reference), wavelengths shorter than original / high_freq_factor
    positions keep their frequency, those longer than original / low_freq_factor have it divided by `factor`, and frequencies
    between them are interpolated. original: original_max_position_embeddings.
    """
    exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float32, device=device) / architecture.head_dim
    frequencies = 1.0 / (architecture.rope_theta**exponents)
    scaling = architecture.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = share.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor
