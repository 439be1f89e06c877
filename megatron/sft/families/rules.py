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
class Buffer:
    """A vector that belongs to the model and is not trained. It keeps its dtype, whatever that of the weights.

    lead: the Hugging Face tensor is [1, size].
    """

    megatron: str
    name: str
    lead: bool = False
    tp_dim: int | None = None
    num_fused: int = 1

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.name,)

    def to_megatron(self, architecture: Architecture, *tensors: Tensor) -> Tensor:
        return tensors[0].squeeze(0) if self.lead else tensors[0]

    def to_hf(self, architecture: Architecture, parameter: Tensor) -> tuple[Tensor, ...]:
        return (parameter[None] if self.lead else parameter,)


@dataclass(frozen=True)
class QKV:
    """Query, key and value projections (weights or biases) in one parameter, grouped by KV head.

    Megatron stores the query heads of each KV head, then its key, then its value, so a tensor-parallel rank's part is one
    contiguous chunk: [KV heads x (query heads per KV head + 2) x head_dim, hidden size]. See `join_heads`.
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
        return join_heads(architecture, *tensors)

    def to_hf(self, architecture: Architecture, parameter: Tensor) -> tuple[Tensor, ...]:
        return split_heads(architecture, parameter)


@dataclass(frozen=True)
class FusedQKV:
    """The same parameter of one Hugging Face tensor: all queries, then all keys, then all values."""

    megatron: str
    name: str
    tp_dim: int | None = 0
    num_fused: int = 1

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.name,)

    def to_megatron(self, architecture: Architecture, *tensors: Tensor) -> Tensor:
        heads, dim = (architecture.num_heads, architecture.num_kv_heads), architecture.head_dim
        return join_heads(architecture, *tensors[0].split([heads[0] * dim, heads[1] * dim, heads[1] * dim]))

    def to_hf(self, architecture: Architecture, parameter: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat(split_heads(architecture, parameter)),)


def join_heads(architecture: Architecture, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[KV heads x (query heads of each + 2) x head_dim, ...] of three projections.

    Where the attention has a gate, each query head is followed by its gate in `query`, and the gates follow the queries of a
    KV head in the result, as megatron-core has them. Interleaved rotated dimensions are put half of `Rope.dim` apart.
    """
    rest = query.shape[1:]
    groups, dim = architecture.num_kv_heads, architecture.head_dim
    queries = query.reshape(groups, architecture.num_heads // groups, -1, dim, *rest).transpose(1, 2)  # [groups, 1 or 2, heads]
    heads = [halved(architecture, queries[:, :1].flatten(1, 2)), queries[:, 1:].flatten(1, 2)]
    heads += [halved(architecture, key.reshape(groups, 1, dim, *rest)), value.reshape(groups, 1, dim, *rest)]
    return torch.cat(heads, dim=1).reshape(-1, *rest)


def split_heads(architecture: Architecture, parameter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections of `join_heads`."""
    rest = parameter.shape[1:]
    groups, dim = architecture.num_kv_heads, architecture.head_dim
    num_queries = architecture.num_heads // groups
    gates = num_queries if architecture.attention_gate else 0
    grouped = parameter.reshape(groups, -1, dim, *rest)
    query, gate, key, value = grouped.split([num_queries, gates, 1, 1], dim=1)
    query = interleaved(architecture, query)
    if gates:
        query = torch.stack([query, gate], dim=2)
    return query.reshape(-1, *rest), interleaved(architecture, key).reshape(-1, *rest), value.reshape(-1, *rest)


def halved(architecture: Architecture, heads: Tensor) -> Tensor:
    """[groups, heads, head_dim, ...] with pairs of rotated dimensions (2 i, 2 i + 1) put to (i, i + half)."""
    if not architecture.interleaved_rope:
        return heads
    rotated = architecture.ropes[0].dim
    pairs = heads[:, :, :rotated].unflatten(2, (-1, 2)).transpose(2, 3).flatten(2, 3)
    return torch.cat([pairs, heads[:, :, rotated:]], dim=2)


def interleaved(architecture: Architecture, heads: Tensor) -> Tensor:
    """The inverse of `halved`."""
    if not architecture.interleaved_rope:
        return heads
    rotated = architecture.ropes[0].dim
    pairs = heads[:, :, :rotated].unflatten(2, (2, -1)).transpose(2, 3).flatten(2, 3)
    return torch.cat([pairs, heads[:, :, rotated:]], dim=2)


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


@dataclass(frozen=True)
class InterleavedGateUp:
    """The same of one Hugging Face tensor [inputs, outputs] ([outputs] of a bias), whose outputs are gate and up in turn."""

    megatron: str
    name: str
    tp_dim: int | None = 0
    num_fused: int = 2

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.name,)

    def to_megatron(self, architecture: Architecture, *tensors: Tensor) -> Tensor:
        rows = tensors[0].t()
        return torch.cat([rows[0::2], rows[1::2]])

    def to_hf(self, architecture: Architecture, parameter: Tensor) -> tuple[Tensor, ...]:
        return (torch.stack(parameter.chunk(2), dim=1).flatten(0, 1).t().contiguous(),)


@dataclass(frozen=True)
class Transposed:
    """A matrix that the Hugging Face tensor has as [inputs, outputs]."""

    megatron: str
    name: str
    tp_dim: int | None = None
    num_fused: int = 1

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.name,)

    def to_megatron(self, architecture: Architecture, *tensors: Tensor) -> Tensor:
        return tensors[0].t().contiguous()

    def to_hf(self, architecture: Architecture, parameter: Tensor) -> tuple[Tensor, ...]:
        return (parameter.t().contiguous(),)


@dataclass(frozen=True)
class GroupedRows:
    """Hugging Face tensors in one parameter whose rows are grouped by head, so that a tensor-parallel rank's part is one chunk.

    blocks: for each tensor the rows of a head in each of the blocks that lie one below the other in it; a parameter has, head
    by head, the rows of all blocks.
    """

    megatron: str
    names: tuple[str, ...]
    blocks: tuple[tuple[int, ...], ...]
    num_heads: int
    tp_dim: int | None = 0
    num_fused: int = 1

    @property
    def hf(self) -> tuple[str, ...]:
        return self.names

    def to_megatron(self, architecture: Architecture, *tensors: Tensor) -> Tensor:
        rest = tensors[0].shape[1:]
        parts = [
            block.reshape(self.num_heads, -1, *rest)
            for tensor, rows in zip(tensors, self.blocks, strict=True)
            for block in tensor.split([self.num_heads * count for count in rows])
        ]
        return torch.cat(parts, dim=1).reshape(-1, *rest)

    def to_hf(self, architecture: Architecture, parameter: Tensor) -> tuple[Tensor, ...]:
        rest = parameter.shape[1:]
        grouped = parameter.reshape(self.num_heads, -1, *rest)
        parts = iter(grouped.split([count for rows in self.blocks for count in rows], dim=1))
        return tuple(torch.cat([next(parts).reshape(-1, *rest) for _ in rows]) for rows in self.blocks)


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
