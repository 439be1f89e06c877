"""OLMoE: Llama's architecture with experts in every layer, queries and keys normed over all heads."""

from typing import Any

MODEL_TYPES = ("olmoe",)
FIXED = {"clip_qkv": None}
IMMATERIAL = {"output_router_logits", "router_aux_loss_coef"}
USED = {"attention_bias", "num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob"}
DEFAULTS = {"rms_norm_eps": 1e-5}


def pieces(config: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias"))
    return {"query_key_norm": "projection", "qkv_bias": bias, "output_bias": bias}


def moe(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": int(config["num_experts"] if "num_experts" in config else config["num_local_experts"]),
        "experts_per_token": int(config["num_experts_per_tok"]),
        "ffn_hidden_size": int(config["intermediate_size"]),
        "normalized": bool(config.get("norm_topk_prob", False)),
    }
