"""Rules: how a Megatron parameter is made of Hugging Face tensors, and the inverse.

A rule names the whole parameter, before any tensor parallelism, as megatron-core's distributed checkpoints do, with `{layer}`
and `{expert}` for indices: layers and experts are leading dimensions of one stored tensor there.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron.sft.families.architecture import Architecture


class Rule(Protocol):
    """A Megatron parameter and the Hugging Face tensors that it is made of, as templates of names."""

    @property
    def megatron(self) -> str:
        """The Megatron parameter's name."""

    @property
    def hf(self) -> tuple[str, ...]:
        """Names of the Hugging Face tensors, in the order of `to_megatron`'s arguments."""

    @property
    def tp_dim(self) -> int | None:
        """The dimension that tensor parallelism splits; None: every rank holds the whole parameter."""

    @property
    def num_fused(self) -> int:
        """Number of blocks along `tp_dim` that tensor parallelism splits one by one."""

    def to_megatron(self, architecture: Architecture, *tensors: Tensor) -> Tensor:
        """The Megatron parameter made of the Hugging Face tensors. Shapes that do not fit raise a RuntimeError."""

    def to_hf(self, architecture: Architecture, parameter: Tensor) -> tuple[Tensor, ...]:
        """The Hugging Face tensors that the Megatron parameter holds, as views where possible. Inverse of `to_megatron`."""


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name."""

    megatron: str
    name: str
    tp_dim: int | None = None
    num_fused: int = 1

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.name,)

    def to_megatron(self, architecture: Architecture, *tensors: Tensor) -> Tensor:
        return tensors[0]

    def to_hf(self, architecture: Architecture, parameter: Tensor) -> tuple[Tensor, ...]:
        return (parameter,)


@dataclass(frozen=True)
class QKV:
    """Query, key and value projections (weights or biases) in one parameter, grouped by KV head.

    Megatron stores the query heads of each KV head, then its key, then its value, so a tensor-parallel rank's part is one
    contiguous chunk: [KV heads x (query heads per KV head + 2) x head_dim, hidden size].
    """

    megatron: str
    query: str
    key: str
    value: str
    tp_dim: int | None = 0
    num_fused: int = 1

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value)

    def to_megatron(self, architecture: Architecture, *tensors: Tensor) -> Tensor:
        rest = tensors[0].shape[1:]
        shape = (architecture.num_kv_heads, -1, architecture.head_dim, *rest)  # [KV heads, heads of each, dim, ...]
        return torch.cat([tensor.reshape(shape) for tensor in tensors], dim=1).reshape(-1, *rest)

    def to_hf(self, architecture: Architecture, parameter: Tensor) -> tuple[Tensor, ...]:
        rest = parameter.shape[1:]
        grouped = parameter.reshape(architecture.num_kv_heads, -1, architecture.head_dim, *rest)
        parts = grouped.split([architecture.num_heads // architecture.num_kv_heads, 1, 1], dim=1)
        query, key, value = (part.reshape(-1, *rest) for part in parts)
        return query, key, value


@dataclass(frozen=True)
class GateUp:
    """The gate and up projections of a gated MLP in one parameter, gate first; a tensor-parallel rank holds a part of each."""

    megatron: str
    gate: str
    up: str
    tp_dim: int | None = 0
    num_fused: int = 2

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def to_megatron(self, architecture: Architecture, *tensors: Tensor) -> Tensor:
        return torch.cat(tensors, dim=0)

    def to_hf(self, architecture: Architecture, parameter: Tensor) -> tuple[Tensor, ...]:
        gate, up = parameter.chunk(2, dim=0)
        return gate, up


def tensor_parallel_part(rule: Rule, parameter: Tensor, rank: int, size: int) -> Tensor:
    """The part of a whole parameter that tensor-parallel rank `rank` of `size` holds."""
    if rule.tp_dim is None or size == 1:
        return parameter
    blocks = parameter.chunk(rule.num_fused, dim=rule.tp_dim)
    return torch.cat([block.chunk(size, dim=rule.tp_dim)[rank] for block in blocks], dim=rule.tp_dim)


def join_tensor_parallel(rule: Rule, parts: list[Tensor]) -> Tensor:
    """The whole parameter of all ranks' parts, in the order of ranks. Inverse of `tensor_parallel_part`."""
    if rule.tp_dim is None or len(parts) == 1:
        return parts[0]
    blocks = [part.chunk(rule.num_fused, dim=rule.tp_dim) for part in parts]  # ranks x blocks
    return torch.cat([blocks[rank][block] for block in range(rule.num_fused) for rank in range(len(parts))], rule.tp_dim)
