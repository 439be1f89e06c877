"""Qwen1.5-MoE and Qwen2-57B-A14B: experts next to a shared one behind a gate, and biases on query, key and value."""

from typing import Any

MODEL_TYPES = ("qwen2_moe",)
FIXED = {"use_sliding_window": False}
# They have an effect only with use_sliding_window; the others on the loss of a training that is not this one.
IMMATERIAL = {"sliding_window", "max_window_layers", "output_router_logits", "router_aux_loss_coef"}
USED = {
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
    "shared_expert_intermediate_size", "mlp_only_layers", "decoder_sparse_step", "qkv_bias",
}  # fmt: skip
DEFAULTS = {
    "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
    "qkv_bias": True,
}  # fmt: skip
NAMES = {"shared": "shared_expert"}


def pieces(config: dict[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": bool(config["qkv_bias"])}


def moe(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": int(config["num_experts"] if "num_experts" in config else config["num_local_experts"]),
        "experts_per_token": int(config["num_experts_per_tok"]),
        "ffn_hidden_size": int(config["moe_intermediate_size"]),
        "normalized": bool(config.get("norm_topk_prob", False)),
        "shared_width": int(config["shared_expert_intermediate_size"]),
        "shared_gate": True,
    }
