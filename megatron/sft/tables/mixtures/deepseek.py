"""DeepSeek-V2 and V3 with those built alike, Moonlight and Kimi K2, and GLM-4.7-Flash: multi-head latent attention.

The routers of V3 have sigmoid scores, a correction bias and groups, those of V2 softmax scores and groups by their best expert.
"""

import math
from typing import Any

# Kimi K2 is DeepSeek-V3 under another name.
MODEL_TYPES = ("deepseek_v3", "kimi_k2", "deepseek_v2", "glm4_moe_lite")
USED = {
    "attention_bias", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave",
    "n_routed_experts", "num_local_experts", "num_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
    "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "topk_method", "first_k_dense_replace",
    "mlp_layer_types",
}  # fmt: skip
FIXED = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
IMMATERIAL = {
    "num_nextn_predict_layers", "num_mtp_layers", "output_router_logits", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux",
    "ep_size", "pretraining_tp", "qk_head_dim", "auto_map",
}  # fmt: skip
DEFAULTS = {
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "rope_interleave": True, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "rms_norm_eps": 1e-6,
}  # fmt: skip
OF_TYPE = {
    "deepseek_v2": {
        "FIXED": {
            "scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1, "mlp_bias": False,
            "rope_interleave": True,
        },
        "DEFAULTS": {
            **DEFAULTS, "n_shared_experts": 2, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
            "norm_topk_prob": False, "routed_scaling_factor": 1.0, "first_k_dense_replace": 0,
        },
    },
    "glm4_moe_lite": {
        # The layers' types count; a config.json without them means this.
        "FIXED": {**FIXED, "first_k_dense_replace": 1},
        "DEFAULTS": {
            **DEFAULTS, "q_lora_rank": 768, "qk_nope_head_dim": 192, "v_head_dim": 256, "num_experts_per_tok": 4,
            "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8, "first_k_dense_replace": 1, "rms_norm_eps": 1e-5,
        },
    },
}  # fmt: skip


def pieces(config: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias"))
    interleaved, scale = bool(config["rope_interleave"]), _attention_scale(config)
    return {"interleaved_rope": interleaved, "qkv_bias": bias, "output_bias": bias, "attention_scale": scale}


def _attention_scale(config: dict[str, Any]) -> float | None:
    """YaRN's correction of the temperature, which these models have in the softmax: once for queries and once for keys."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    share = rope.get("mscale_all_dim")
    if rope.get("rope_type", rope.get("type", "default")) == "default" or not share:
        return None
    factor = float(rope["factor"])
    correction = 1.0 if factor <= 1 else 0.1 * float(share) * math.log(factor) + 1.0
    return correction * correction / math.sqrt(int(config["qk_nope_head_dim"]) + int(config["qk_rope_head_dim"]))


def latent(config: dict[str, Any]) -> dict[str, Any]:
    names = {"kv_rank": "kv_lora_rank", "nope_dim": "qk_nope_head_dim", "rope_dim": "qk_rope_head_dim"}
    sizes: dict[str, Any] = {field: int(config[name]) for field, name in {**names, "value_dim": "v_head_dim"}.items()}
    rank = config["q_lora_rank"]
    return {**sizes, "query_rank": None if rank is None else int(rank)}


def experts(config: dict[str, Any]) -> list[bool]:
    if types := config.get("mlp_layer_types"):
        return [kind == "sparse" for kind in types]
    return [layer >= int(config["first_k_dense_replace"]) for layer in range(int(config["num_hidden_layers"]))]


def moe(config: dict[str, Any]) -> dict[str, Any]:
    if not any(experts(config)):
        return {}
    number = next(config[name] for name in ("n_routed_experts", "num_local_experts", "num_experts") if config.get(name))
    sizes = {
        "num_experts": int(number),
        "experts_per_token": int(config["num_experts_per_tok"]),
        "ffn_hidden_size": int(config["moe_intermediate_size"]),
        "shared_width": int(config["n_shared_experts"] or 0) * int(config["moe_intermediate_size"]),
        "scale": float(config["routed_scaling_factor"]),
    }
    in_groups = config.get("topk_method") != "greedy"
    if in_groups:
        sizes |= {"num_groups": int(config["n_group"]), "chosen_groups": int(config["topk_group"])}
    if config["model_type"] == "deepseek_v2":
        return {**sizes, "normalized": False, "group_score": "best"}
    sigmoid = {"scores": "sigmoid", "correction_bias": True, "least_sum": 1e-20}
    return {**sizes, **sigmoid, "normalized": bool(config["norm_topk_prob"])}
