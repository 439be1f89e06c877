"""What a model of an unknown model_type is made of, as far as its config.json says, and which parts exist here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class _Piece:
    name: str
    built: bool
    is_in: Callable[[Config], Any]


def _has(*fields: str) -> Callable[[Config], bool]:
    """Whether one of the fields is there and says something."""
    return lambda config: any(bool(config.get(name)) and str(config[name]) != "1.0" for name in fields)


def _types(*kinds: str) -> Callable[[Config], bool]:
    return lambda config: bool(set(kinds) & set(config.get("layer_types") or ()))


def _activation(config: Config) -> bool:
    return config.get("hidden_act", config.get("hidden_activation", "silu")) not in ("silu", "swish", "gelu_pytorch_tanh")


_KNOWN_TYPES = {"full_attention", "sliding_attention", "linear_attention", "attention", "conv", "mamba", "chunked_attention"}

# In the order in which a message names them.
_PIECES = (
    _Piece("experts", True, _has("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")),
    _Piece("dense first layers", True, _has("first_k_dense_replace", "moe_layer_start_index", "mlp_only_layers")),
    _Piece("windows in some layers", True, _types("sliding_attention")),
    _Piece("gated delta nets", True, _types("linear_attention")),
    _Piece("layers without positions", True, _has("no_rope_layers", "no_rope_layer_interval")),
    _Piece("partial rotation", True, _has("partial_rotary_factor", "rotary_pct", "rotary_percent")),
    _Piece("scaled positions", True, _has("rope_scaling")),
    _Piece("normed queries and keys", True, _has("use_qk_norm", "qk_norm", "qk_layernorm", "use_qk_layernorm")),
    _Piece("biases", True, _has("attention_bias", "use_bias", "mlp_bias", "attention_out_bias", "use_qkv_bias")),
    _Piece("clamped SwiGLU", True, _has("swiglu_limit")),
    _Piece("attention sinks", True, lambda config: config.get("model_type") == "mimo_v2_flash"),
    _Piece("multipliers", True, _has("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale")),
    _Piece("capped logits", True, _has("final_logit_softcapping")),
    _Piece("an attention gate", True, _has("attn_output_gate")),
    _Piece("heads that predict further tokens, carried", True, _has("num_nextn_predict_layers", "mtp_num_hidden_layers")),
    _Piece("a vision tower, carried", True, _has("vision_config")),
    _Piece("multi-head latent attention", True, _has("kv_lora_rank", "q_lora_rank")),
    _Piece("shared experts", True, _has("n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size")),
    _Piece(
        "a router with sigmoid scores or correction biases",
        True,
        lambda config: (
            config.get("scoring_func") == "sigmoid"
            or config.get("topk_method") == "noaux_tc"
            or _has("use_routing_bias", "moe_router_enable_expert_bias")(config)
        ),
    ),
    _Piece("sparse attention with an indexer", False, _has("index_topk", "index_n_heads")),
    _Piece("capped attention scores", False, _has("attn_logit_softcapping")),
    _Piece("Mamba layers", False, lambda config: any("mamba" in name or name.startswith("ssm_") for name in config)),
    _Piece("short convolutions", False, _types("conv")),
    _Piece("chunked attention", False, _types("chunked_attention")),
    _Piece("layers that share keys and values", False, _has("num_kv_shared_layers")),
    _Piece("inputs of each layer", False, _has("hidden_size_per_layer_input")),
    _Piece("heads of two sizes", False, _has("global_head_dim")),
    _Piece("LayerNorm", False, _has("layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon")),
    _Piece("attention and MLP side by side", False, _has("use_parallel_residual", "parallel_attn")),
    _Piece("learned positions", False, lambda config: "n_positions" in config),
    _Piece("an encoder", False, _has("is_encoder_decoder")),
    _Piece("an audio part", False, _has("audio_config")),
    _Piece("another activation than SwiGLU and GeGLU", False, _activation),
    _Piece("other kinds of layers", False, lambda config: bool(set(config.get("layer_types") or ()) - _KNOWN_TYPES)),
)


def what_is_missing(config: Config) -> str:
    """`it needs windows in some layers and attention sinks, which exist, …; a table of its weights is missing`."""
    text = config.get("text_config")
    flat = {**config, **(text if isinstance(text, dict) else {}), "model_type": (text or config).get("model_type")}
    there = [piece.name for piece in _PIECES if piece.built and piece.is_in(flat)]
    lacking = [piece.name for piece in _PIECES if not piece.built and piece.is_in(flat)]
    parts = []
    if there:
        parts.append(f"{_listed(there)}, which {'exists' if len(there) == 1 else 'exist'} here")
    if lacking:
        parts.append(f"{_listed(lacking)}, which {'does' if len(lacking) == 1 else 'do'} not")
    table = "a table of its weights is missing (CONTRIBUTING.md, Adding a model family)"
    if not parts:
        return f"config.json names nothing unusual, but {table}"
    return f"it needs {', and '.join(parts)}; {table}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
