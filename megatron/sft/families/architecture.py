"""A model's architecture as config.json states it: sizes, pieces, and the mixture of experts if there is one."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the long wave lengths of RoPE (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class MoEConfig:
    """The mixture of experts that stands in place of every layer's MLP."""

    num_experts: int
    experts_per_token: int
    ffn_hidden_size: int
    # True: the weights of a token's experts sum to 1, so softmax before or after the choice of experts is the same.
    normalized: bool


@dataclass(frozen=True)
class Architecture:
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
    moe: MoEConfig | None = None
