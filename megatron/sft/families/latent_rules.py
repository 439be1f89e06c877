"""The rule of latent attention's projections, whose heads end with the rotated dimensions on Hugging Face's side."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.rules import halved, interleaved


@dataclass(frozen=True)
class RotatedRows:
    """Hugging Face tensors one below the other, the last one's heads with their rotated dimensions first.

    On Hugging Face's side a head ends with them, here it begins with them: [heads x (rotated + others), ...]. Interleaved ones
    are put half of `Rope.dim` apart.
    """

    megatron: str
    names: tuple[str, ...]
    num_heads: int
    tp_dim: int | None = 0
    num_fused: int = 1

    @property
    def hf(self) -> tuple[str, ...]:
        return self.names

    def to_megatron(self, architecture: Architecture, *tensors: Tensor) -> Tensor:
        *others, last = tensors
        heads = last.reshape(self.num_heads, 1, -1, *last.shape[1:])
        rotated = architecture.ropes[0].dim
        kept, turned = heads.split([heads.shape[2] - rotated, rotated], dim=2)
        heads = halved(architecture, torch.cat([turned, kept], dim=2))
        return torch.cat([*others, heads.reshape(last.shape)])

    def to_hf(self, architecture: Architecture, parameter: Tensor) -> tuple[Tensor, ...]:
        sizes = [self._rows_before(architecture)] if len(self.names) > 1 else []
        *others, last = parameter.split([*sizes, len(parameter) - sum(sizes)])
        rotated = architecture.ropes[0].dim
        heads = interleaved(architecture, last.reshape(self.num_heads, 1, -1, *last.shape[1:]))
        turned, kept = heads.split([rotated, heads.shape[2] - rotated], dim=2)
        return *others, torch.cat([kept, turned], dim=2).reshape(last.shape)

    def _rows_before(self, architecture: Architecture) -> int:
        assert architecture.latent is not None
        return architecture.latent.query_rank or 0
