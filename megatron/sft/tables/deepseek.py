"""DeepSeek-V2 and V3 (with Moonlight and R1), Kimi K2 and GLM-4.7-Flash: multi-head latent attention."""

import math
from typing import Any

MODEL_TYPES = ("deepseek_v3", "deepseek_v2", "kimi_k2", "glm4_moe_lite")
USED = {
    "attention_bias", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave",
    "first_k_dense_replace", "qk_head_dim", "num_nextn_predict_layers",
}  # fmt: skip
IMMATERIAL = {
    "pretraining_tp", "output_router_logits", "n_routed_experts", "n_shared_experts", "n_group", "topk_group",
    "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "routed_scaling_factor", "topk_method", "mlp_layer_types",
    "num_experts", "num_local_experts", "num_mtp_layers", "mlp_bias",
}  # fmt: skip
_SIZES = {
    "num_hidden_layers": 61, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "rms_norm_eps": 1e-6,
}  # fmt: skip
DEFAULTS = {**_SIZES, "first_k_dense_replace": 3, "rope_interleave": True}


def pieces(config: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias"))
    return {
        "interleaved_rope": bool(config["rope_interleave"]),
        "qkv_bias": bias,
        "output_bias": bias,
        "attention_scale": _attention_scale(config),
    }


def _attention_scale(config: dict[str, Any]) -> float | None:
    """YaRN's correction of the temperature, which these models have in the softmax: once for queries and once for keys."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    share = rope.get("mscale_all_dim")
    if rope.get("rope_type", rope.get("type", "default")) == "default" or not share:
        return None
    factor = float(rope["factor"])
    correction = 1.0 if factor <= 1 else 0.1 * float(share) * math.log(factor) + 1.0
    size = int(config["qk_nope_head_dim"]) + int(config["qk_rope_head_dim"])
    return correction * correction / math.sqrt(size)


def latent(config: dict[str, Any]) -> dict[str, Any]:
    rank = config["q_lora_rank"]
    return {
        "kv_rank": int(config["kv_lora_rank"]),
        "query_rank": None if rank is None else int(rank),
        "nope_dim": int(config["qk_nope_head_dim"]),
        "rope_dim": int(config["qk_rope_head_dim"]),
        "value_dim": int(config["v_head_dim"]),
    }
