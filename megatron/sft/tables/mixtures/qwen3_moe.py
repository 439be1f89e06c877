"""Qwen3 with a mixture of experts in every layer, or in some."""

from typing import Any

MODEL_TYPES = ("qwen3_moe",)
FIXED = {"attention_bias": False, "use_sliding_window": False}
IMMATERIAL = {"sliding_window", "max_window_layers", "output_router_logits", "router_aux_loss_coef"}
# transformers 5 calls num_experts num_local_experts.
USED = {
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "mlp_only_layers",
    "decoder_sparse_step",
}  # fmt: skip
PIECES = {"query_key_norm": "head"}


def moe(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": int(config["num_experts"] if "num_experts" in config else config["num_local_experts"]),
        "experts_per_token": int(config["num_experts_per_tok"]),
        "ffn_hidden_size": int(config["moe_intermediate_size"]),
        "normalized": bool(config.get("norm_topk_prob", False)),
    }
