"""What config.json says of a model, in one form for all families: sizes, the pieces of a layer, and what differs by layer.

A new kind of model needs a new field here, with a default that means "as before"; its table sets it, `model/` builds it,
and export compares it between checkpoint and original.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # which takes seconds, and a name of a dtype is all that is needed of it here


@dataclass(frozen=True)
class RopeScaling:
    """A change of RoPE's frequencies for long contexts: config.json's `rope_type` and what its formula takes.

    original: positions of the first training (original_max_position_embeddings); for `dynamic`, max_position_embeddings.
    low, high: llama3's low_freq_factor and high_freq_factor, yarn's beta_slow and beta_fast. share: of the head's dimensions
    that `proportional` rotates. short, long: longrope's factors of each pair of dimensions.
    """

    kind: str
    factor: float = 1.0
    original: int = 0
    low: float = 0.0
    high: float = 0.0
    truncated: bool = True
    share: float = 1.0
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    @property
    def by_length(self) -> bool:
        """True if the frequencies depend on the length of a conversation."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class Rope:
    """How queries and keys are rotated. dim: the dimensions of a head that are, from its first on.

    attention_factor: cosines and sines are multiplied by it. query_beta: a query at position p is multiplied by
    1 + query_beta * log(1 + floor(p / original)) as well (Llama 4's scaling), original: `query_original`.
    """

    theta: float
    dim: int
    attention_factor: float = 1.0
    scaling: RopeScaling | None = None
    query_beta: float = 0.0
    query_original: int = 0


ATTENTION, GATED_DELTA_NET, LATENT_ATTENTION = "attention", "gated_delta_net", "latent_attention"


@dataclass(frozen=True)
class Layer:
    """What may differ from one layer to the next. mixer: what carries information from token to token.

    window: tokens that a token attends to, itself and those just before it; None: all before it. rope: None where positions
    are not marked. experts: a mixture of experts in place of the MLP.
    """

    mixer: str = ATTENTION
    window: int | None = None
    rope: Rope | None = None
    experts: bool = False


@dataclass(frozen=True)
class MoEConfig:
    """The mixture of experts that replaces a layer's MLP, its router, and what every token goes through next to it.

    A token goes to the experts with the highest scores, within the groups with the highest scores of groups.
    """

    num_experts: int
    experts_per_token: int
    ffn_hidden_size: int
    # The weights of a token's experts, their scores, are divided by their sum, or by `least_sum` where that is more.
    normalized: bool
    least_sum: float = 0.0
    # Of a token's logits: "softmax" over all experts, or each one's "sigmoid".
    scores: str = "softmax"
    # A vector that is not trained is added to the scores for the choice, not for the weights.
    correction_bias: bool = False
    # Experts that follow one another are a group; a group's score is the sum of its two best experts' or the best one's.
    num_groups: int = 1
    chosen_groups: int = 1
    group_score: str = "two best"
    # The weights are multiplied by it.
    scale: float = 1.0
    # Biases of the router's and of the experts' projections.
    router_bias: bool = False
    expert_bias: bool = False
    # Width of the MLP that every token goes through as well, 0 without; times the sigmoid of a projection to one number.
    shared_width: int = 0
    shared_gate: bool = False


@dataclass(frozen=True)
class DeltaNetConfig:
    """Sizes of a gated delta net: each key head serves num_value_heads / num_key_heads value heads that follow one another."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel: int  # tokens that the convolution before it reads

    @property
    def values_per_key(self) -> int:
        return self.num_value_heads // self.num_key_heads

    @property
    def input_rows(self) -> int:
        """Outputs of the input projection: query, key, value and gate of each head, and its two step sizes."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * (2 * self.value_dim + 2)

    @property
    def convolved_rows(self) -> int:
        """Query, key and value, which the convolution takes."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim


@dataclass(frozen=True)
class LatentConfig:
    """Sizes of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): queries and keys are wider than values.

    A token's keys and values are made of one vector of `kv_rank`, its queries of one of `query_rank`, or of the hidden state
    where it is None. Of a query or key `nope_dim` dimensions are not rotated; `rope_dim` are, which all keys of a token share.
    """

    kv_rank: int
    query_rank: int | None
    nope_dim: int
    rope_dim: int
    value_dim: int
    # Of the norms of the two vectors, whatever the other norms have: transformers' and DeepSeek's own.
    norm_epsilon: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Of a query or key."""
        return self.nope_dim + self.rope_dim

    @property
    def down_rows(self) -> int:
        """Outputs of the projection to the vectors and the shared part of the keys."""
        return (self.query_rank or 0) + self.rope_dim + self.kv_rank


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
    tied_embeddings: bool
    torch_dtype: "torch.dtype"
    layers: tuple[Layer, ...]
    moe: MoEConfig | None = None
    delta_net: DeltaNetConfig | None = None
    latent: LatentConfig | None = None
    # Biases of query, key and value (with latent attention: of what is projected down), of the attention's output, of the MLP.
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    # Queries and keys are normed: each head's ("head"), each head's after rotation ("rotated head"), or all heads of a token
    # as one vector ("projection").
    query_key_norm: str | None = None
    # Where a layer's norms stand: before attention and MLP ("before"), after them ("after"), or both.
    norms: str = "before"
    # A norm multiplies by 1 + weight.
    zero_centered_norm: bool = False
    # silu, gelu_tanh, or clamped_silu (gpt-oss).
    activation: str = "silu"
    # Hugging Face's side has pairs of rotated dimensions as neighbours; Megatron parameters have them half of `Rope.dim` apart.
    interleaved_rope: bool = False
    # The attention's result is multiplied by the sigmoid of a further projection.
    attention_gate: bool = False
    # Each head may attend to nothing, with a learnt score.
    attention_sinks: bool = False
    # Scores are multiplied by it; None: 1 / sqrt(head_dim).
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    # Logits x become cap * tanh(x / cap).
    logit_cap: float | None = None

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different rotations of the layers, in the order in which they first occur."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers if layer.rope is not None))

    @property
    def windows(self) -> tuple[int, ...]:
        """The different windows of the layers."""
        return tuple(dict.fromkeys(layer.window for layer in self.layers if layer.window is not None))

    @property
    def layers_differ(self) -> bool:
        """True if some layers have other weights than others: then checkpoints hold each layer under its number."""
        return len({(layer.mixer, layer.experts) for layer in self.layers}) > 1
