"""The kinds of correspondence between a Megatron parameter and Hugging Face tensors, each usable in both directions.

A rule names the whole (never tensor-parallel) parameter in the spelling of megatron-core's distributed checkpoints, with
`{layer}` and `{expert}` for the numbers that megatron-core keeps as leading dimensions of one stored tensor.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the long wave lengths of RoPE (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Mixture:
    """The mixture of experts that stands in place of every layer's MLP."""

    num_experts: int
    experts_per_token: int
    ffn_hidden_size: int
    # True: the weights of a token's experts sum to 1, so softmax before or after the choice of experts is the same.
    normalized: bool


@dataclass(frozen=True)
class Shape:
    """A model's architecture, read from Hugging Face's config.json by its family and from nowhere else."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_epsilon: float
    rope_theta: float
    tied_embeddings: bool
    qkv_bias: bool
    torch_dtype: torch.dtype
    rope_scaling: RopeScaling | None = None
    # A token attends to itself and this many tokens less one before it; None: to all before it.
    sliding_window: int | None = None
    qk_norm: bool = False
    mixture: Mixture | None = None


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
