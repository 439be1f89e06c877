"""GLM-4.5 to 4.7 and their Air models: sigmoid scores with a correction bias, shared experts, and dense first layers."""

from typing import Any

MODEL_TYPES = ("glm4_moe",)
USED = {
    "attention_bias", "use_qk_norm", "n_routed_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size",
    "n_shared_experts", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace",
}  # fmt: skip
FIXED = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_router_dtype": "float32", "decoder_sparse_step": 1}
IMMATERIAL = {"num_nextn_predict_layers", "num_mtp_layers", "output_router_logits", "router_aux_loss_coef"}
DEFAULTS = {
    "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "rms_norm_eps": 1e-5,
}  # fmt: skip
PARTIAL_ROTARY = 0.5


def pieces(config: dict[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": bool(config.get("attention_bias")), "query_key_norm": "head" if config.get("use_qk_norm") else None}


def experts(config: dict[str, Any]) -> list[bool]:
    return [layer >= int(config["first_k_dense_replace"]) for layer in range(int(config["num_hidden_layers"]))]


def moe(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": int(config["n_routed_experts"] if "n_routed_experts" in config else config["num_local_experts"]),
        "experts_per_token": int(config["num_experts_per_tok"]),
        "ffn_hidden_size": int(config["moe_intermediate_size"]),
        "scores": "sigmoid",
        "correction_bias": True,
        "num_groups": int(config["n_group"]),
        "chosen_groups": int(config["topk_group"]),
        "normalized": bool(config["norm_topk_prob"]),
        "least_sum": 1e-20,
        "scale": float(config["routed_scaling_factor"]),
        "shared_width": int(config["n_shared_experts"]) * int(config["moe_intermediate_size"]),
    }
