"""MiniMax-M2 to M2.5: sigmoid scores with a correction bias, queries and keys normed over all heads, half of a head rotated."""

from typing import Any

MODEL_TYPES = ("minimax_m2",)
FIXED = {
    "scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True, "qk_norm_type": "per_layer",
    "router_jitter_noise": 0.0, "shared_intermediate_size": 0, "attention_bias": False, "sliding_window": None,
}  # fmt: skip
# Of the program that the models were trained with, of code that is not run, and of heads that the folders do not have.
IMMATERIAL = {
    "auto_map", "attn_type_list", "output_router_logits", "router_aux_loss_coef", "shared_moe_mode", "mlp_intermediate_size",
    "layernorm_full_attention_beta", "layernorm_linear_attention_beta", "layernorm_mlp_beta", "use_mtp", "num_mtp_modules",
    "mtp_transformer_layers", "max_model_len",
}  # fmt: skip
USED = {"num_local_experts", "num_experts", "num_experts_per_tok", "rotary_dim"}
DEFAULTS = {"head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-6}
NAMES = {
    "block": "block_sparse_moe", "expert_gate": "w1", "expert_up": "w3", "expert_down": "w2",
    "correction_bias": "e_score_correction_bias",
}  # fmt: skip
PIECES = {"query_key_norm": "projection"}
ROPE_THETA = 5e6
PARTIAL_ROTARY = 1.0


def ropes(config: dict[str, Any]) -> dict[str, Any]:
    """Released models have `rotary_dim`, the rotated dimensions of a head, in place of their share."""
    parameters = {"rope_theta": config.get("rope_theta"), **(config.get("rope_parameters") or config.get("rope_scaling") or {})}
    share = config.get("partial_rotary_factor")
    if share is None and config.get("rotary_dim") is not None:
        share = int(config["rotary_dim"]) / int(config["head_dim"])
    return {"full_attention": {"partial_rotary_factor": share, **parameters}}


def moe(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": int(config["num_local_experts"] if "num_local_experts" in config else config["num_experts"]),
        "experts_per_token": int(config["num_experts_per_tok"]),
        "ffn_hidden_size": int(config["intermediate_size"]),
        "scores": "sigmoid",
        "correction_bias": True,
        "normalized": True,
    }
