"""What config.json says of a model, in one form for all families: sizes, the pieces of a layer, and how positions are rotated.

A new kind of model needs a new field here, with a default that means "as before"; its family sets it, `model/config.py` builds
it, and export compares it between checkpoint and original.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of RoPE's long wavelengths (`rope_type: llama3`); config.json's names, see families/rope.py."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class MoEConfig:
    """The mixture of experts that replaces every layer's MLP."""

    num_experts: int
    experts_per_token: int
    ffn_hidden_size: int
    # The weights of a token's experts sum to 1, so softmax before or after choosing the experts gives the same.
    normalized: bool


@dataclass(frozen=True)
class Architecture:
    """A model's architecture. `registry.read_architecture` makes it from config.json, the only source of these numbers."""

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
    # Tokens that a token attends to: itself and those just before it. None: all before it.
    sliding_window: int | None = None
    qk_norm: bool = False
    moe: MoEConfig | None = None
