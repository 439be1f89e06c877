"""Weights in 8 bits with scales, as some models are published (`quant_method: fp8`): read as the bfloat16 they stand for.

A weight `X.weight` in float8 has `X.weight_scale_inv` (or `X.weight_scale`): a factor for each block of it, or one for all.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron.sft.families.config_fields import text_fields
from megatron.sft.runtime.errors import UserError

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("_scale_inv", "_scale")
# Of activations, which training does not use.
_UNUSED = (".activation_scale", ".input_scale", ".activation_scale_inv", ".input_scale_inv")


def unquantised_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """config.json without its quantization entry, if that is one of 8-bit weights with scales, or of MXFP4.

    `where` names the file.
    """
    text = text_fields(config)
    entry = config.get("quantization_config") or text.get("quantization_config")
    if not isinstance(entry, dict) or entry.get("quant_method") not in ("fp8", "mxfp4"):
        return config  # refused where the fields are checked
    form = entry.get("fmt", entry.get("weight_format", "e4m3"))
    if form not in ("e4m3", "e5m2", "float8_e4m3fn", "float8_e5m2"):
        raise UserError(f"{where}: the weights are quantised as {form!r}: take the model in its original precision")
    result = {name: value for name, value in config.items() if name != "quantization_config"}
    if text is config:
        return result
    return {**result, "text_config": {name: value for name, value in text.items() if name != "quantization_config"}}


def scales_of(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], where: str) -> tuple[dict[str, str], set[str]]:
    """(weight in 8 bits -> the tensor with its scales, tensors that only scales are in) by the names on disk.

    shapes: name -> dtype and shape. A weight in 8 bits without scales is a `UserError`. `where`: the folder.
    """
    found: dict[str, str] = {}
    for name, (dtype, shape) in shapes.items():
        if dtype not in FLOAT8:
            continue
        scale = next((name + ending for ending in _SCALES if name + ending in shapes), None)
        if scale is None:
            raise UserError(f"{where}: {name} is in 8 bits and has no scales: take the model in its original precision")
        kind, blocks = shapes[scale]
        if not kind.is_floating_point or kind in FLOAT8:
            raise UserError(f"{where}: the scales {scale} are of dtype {kind}, which is not read: take another precision")
        if not (all(size == 1 for size in blocks) or (len(blocks) == len(shape) == 2 and _block(shape, blocks))):
            raise UserError(f"{where}: the scales {scale} {blocks} do not fit {name} {shape}: download the model again")
        found[name] = scale
    return found, {*found.values(), *(name for name in shapes if name.endswith(_UNUSED))}


def _block(shape: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, ...] | None:
    """Rows and columns of a block, a power of two each; None where no such block gives this number of them."""
    sizes = []
    for size, count in zip(shape, blocks, strict=True):
        block = 1
        while block < size and -(-size // block) > count:
            block *= 2
        if -(-size // block) != count:
            return None
        sizes.append(block)
    return tuple(sizes)


def dequantised(weight: Tensor, scales: Tensor, blocks: tuple[int, ...] | None = None) -> Tensor:
    """The weight times its scales, in bfloat16. blocks: rows and columns of a block; unless given, what fits."""
    wide = weight.to(torch.float32)
    factors = scales.to(torch.float32)
    if factors.numel() == 1:
        return (wide * factors.reshape(())).to(torch.bfloat16)
    for dimension, size in enumerate(blocks or _block(tuple(weight.shape), tuple(scales.shape)) or ()):
        factors = factors.repeat_interleave(size, dim=dimension)
    return (wide * factors[: wide.shape[0], : wide.shape[1]]).to(torch.bfloat16)


def block_size(config: dict[str, Any]) -> tuple[int, ...] | None:
    """What config.json says of the blocks."""
    entry = config.get("quantization_config") or text_fields(config).get("quantization_config") or {}
    size = entry.get("weight_block_size") if isinstance(entry, dict) else None
    return tuple(map(int, size)) if size else None
