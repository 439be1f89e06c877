"""The kinds of correspondence between a Megatron parameter and Hugging Face tensors, each usable in both directions.

A rule names the whole (never tensor-parallel) parameter in the spelling of megatron-core's distributed checkpoints, with
`{layer}` and `{expert}` for the numbers that megatron-core keeps as leading dimensions of one stored tensor.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron.sft.families.architecture import Shape


class Rule(Protocol):
    """One Megatron parameter and the Hugging Face tensors that it is made of."""

    @property
    def megatron(self) -> str:
        """The Megatron parameter's name."""

    @property
    def hf(self) -> tuple[str, ...]:
        """Names of the Hugging Face tensors, in the order of `to_megatron`'s arguments."""

    @property
    def split(self) -> int | None:
        """The dimension that tensor parallelism splits, None where every rank holds the whole."""

    @property
    def blocks(self) -> int:
        """Blocks along `split` of each of which every rank holds its part."""

    def to_megatron(self, shape: Shape, *tensors: Tensor) -> Tensor:
        """The Megatron parameter made of the Hugging Face tensors."""

    def to_hf(self, shape: Shape, parameter: Tensor) -> tuple[Tensor, ...]:
        """The Hugging Face tensors that the Megatron parameter holds. Inverse of `to_megatron`."""


@dataclass(frozen=True)
class Same:
    """The same tensor under another name."""

    megatron: str
    name: str
    split: int | None = None
    blocks: int = 1

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.name,)

    def to_megatron(self, shape: Shape, *tensors: Tensor) -> Tensor:
        return tensors[0]

    def to_hf(self, shape: Shape, parameter: Tensor) -> tuple[Tensor, ...]:
        return (parameter,)


@dataclass(frozen=True)
class QKV:
    """Query, key and value projections (weights or biases) in one parameter, grouped by key/value head.

    Megatron stores for every key/value head its query heads, then the key, then the value, so that a tensor-parallel rank's
    part is one contiguous chunk.
    """

    megatron: str
    query: str
    key: str
    value: str
    split: int | None = 0
    blocks: int = 1

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value)

    def to_megatron(self, shape: Shape, *tensors: Tensor) -> Tensor:
        rest = tensors[0].shape[1:]
        parts = [
            t.reshape(shape.num_kv_heads, -1, shape.head_dim, *rest) for t in tensors
        ]  # [kv heads, heads, dim, ...]
        return torch.cat(parts, dim=1).reshape(-1, *rest)

    def to_hf(self, shape: Shape, parameter: Tensor) -> tuple[Tensor, ...]:
        rest = parameter.shape[1:]
        grouped = parameter.reshape(shape.num_kv_heads, -1, shape.head_dim, *rest)
        parts = grouped.split([shape.num_heads // shape.num_kv_heads, 1, 1], dim=1)
        query, key, value = (part.reshape(-1, *rest) for part in parts)
        return query, key, value


@dataclass(frozen=True)
class GateUp:
    """The gate and up projections of a gated MLP, one after the other in one parameter; a rank holds a part of each."""

    megatron: str
    gate: str
    up: str
    split: int | None = 0
    blocks: int = 2

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def to_megatron(self, shape: Shape, *tensors: Tensor) -> Tensor:
        return torch.cat(tensors, dim=0)

    def to_hf(self, shape: Shape, parameter: Tensor) -> tuple[Tensor, ...]:
        gate, up = parameter.chunk(2, dim=0)
        return gate, up


def tensor_parallel_part(rule: Rule, parameter: Tensor, rank: int, size: int) -> Tensor:
    """What tensor-parallel rank `rank` of `size` holds of a whole parameter."""
    if rule.split is None or size == 1:
        return parameter
    blocks = parameter.chunk(rule.blocks, dim=rule.split)
    return torch.cat([block.chunk(size, dim=rule.split)[rank] for block in blocks], dim=rule.split)


def join_tensor_parallel(rule: Rule, parts: list[Tensor]) -> Tensor:
    """The whole parameter of all ranks' parts. Inverse of `tensor_parallel_part`."""
    if rule.split is None or len(parts) == 1:
        return parts[0]
    blocks = [part.chunk(rule.blocks, dim=rule.split) for part in parts]  # ranks x blocks
    return torch.cat([blocks[rank][block] for block in range(rule.blocks) for rank in range(len(parts))], rule.split)
