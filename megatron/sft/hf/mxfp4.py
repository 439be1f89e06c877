"""Experts in MXFP4, as gpt-oss is published: read as the bfloat16 they stand for, exactly.

A tensor X [experts, inputs, outputs] lies in the file as `X_blocks`, uint8 [experts, outputs, blocks, 16], two 4-bit numbers
in a byte, the lower bits first, and `X_scales`, uint8 [experts, outputs, blocks]: 127 plus the exponent of a block's factor.
(OCP Microscaling Formats, version 1.0.)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.sft.hf.safetensors_file import SafetensorsFile
from megatron.sft.runtime.errors import UserError

BLOCKS, SCALES = "_blocks", "_scales"
# Of the 4 bits: sign, two of the exponent, one of the mantissa.
_MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_VALUES = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=torch.bfloat16)


@dataclass(frozen=True)
class PackedExperts:
    """A tensor of all experts of a layer. shape: of one expert's part, (inputs, outputs)."""

    name: str
    blocks: SafetensorsFile
    scales: SafetensorsFile
    num_experts: int
    shape: tuple[int, ...]

    def expert(self, number: int) -> Tensor:
        """One expert's part, bfloat16."""
        blocks = self.blocks.tensor(f"{self.name}{BLOCKS}")[number]
        return unpacked(blocks, self.scales.tensor(f"{self.name}{SCALES}")[number])


def unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """[inputs, outputs] bfloat16 of blocks [outputs, n, 16] and scales [outputs, n], both uint8."""
    pairs = torch.stack([blocks & 0x0F, blocks >> 4], dim=-1)  # [outputs, n, 16, 2]
    values = _VALUES[pairs.int()].flatten(2)  # [outputs, n, 32]
    return torch.ldexp(values, scales.int()[..., None] - 127).to(torch.bfloat16).flatten(1).t().contiguous()


def packed_experts(files: Mapping[str, SafetensorsFile], where: str) -> dict[str, PackedExperts]:
    """The tensors in this form among those of a folder (`where`), by their names without `_blocks`.

    A `UserError` for shapes that are none.
    """
    found = {}
    for name in (name.removesuffix(BLOCKS) for name in files if name.endswith(BLOCKS)):
        if f"{name}{SCALES}" not in files:
            raise UserError(f"{where}: {name}{BLOCKS} has no {name}{SCALES}: download the model again")
        blocks, scales = files[f"{name}{BLOCKS}"], files[f"{name}{SCALES}"]
        (kind, shape), (kind_of_scales, shape_of_scales) = blocks.entries[f"{name}{BLOCKS}"], scales.entries[f"{name}{SCALES}"]
        if {kind, kind_of_scales} != {torch.uint8} or len(shape) != 4 or shape[3] != 16 or shape[:3] != shape_of_scales:
            raise UserError(
                f"{where}: {name}{BLOCKS} {shape} and its scales {shape_of_scales} are not MXFP4: download it again"
            )
        found[name] = PackedExperts(name, blocks, scales, shape[0], (shape[2] * 32, shape[1]))
    return found
