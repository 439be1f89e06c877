"""gpt-oss: clamped SwiGLU and biases in experts and router, attention sinks, and a window in every other layer.

Its folders have the experts in MXFP4, or in bfloat16 as [experts, inputs, outputs] with gate and up in turn.
"""

from typing import Any

MODEL_TYPES = ("gpt_oss",)
USED = {"attention_bias", "num_local_experts", "num_experts", "num_experts_per_tok", "experts_per_token"}
FIXED = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
# The positions of the first training stand in rope_scaling too, which counts.
IMMATERIAL = {"initial_context_length", "output_router_logits", "router_aux_loss_coef"}
DEFAULTS = {
    "head_dim": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "attention_bias": True, "sliding_window": 128,
    "rms_norm_eps": 1e-5, "num_experts_per_tok": 4,
}  # fmt: skip
NAMES = {"router": "router", "expert_fused": "gate_up_proj down_proj"}
SLIDING_WINDOW = True
ROPE_THETA = 150000.0


def layer_types(config: dict[str, Any]) -> list[str]:
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(int(config["num_hidden_layers"]))]


def pieces(config: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config["attention_bias"])
    return {"activation": "clamped_silu", "attention_sinks": True, "qkv_bias": bias, "output_bias": bias}


def moe(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": int(config["num_local_experts"] if "num_local_experts" in config else config["num_experts"]),
        "experts_per_token": int(config["num_experts_per_tok"]),
        "ffn_hidden_size": int(config["intermediate_size"]),
        "normalized": True,
        "router_bias": True,
        "expert_bias": True,
    }
