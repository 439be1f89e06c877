"""Qwen3.5 to 3.8 and Qwen3-Next: three of four layers are gated delta nets, the others have gated attention, a quarter rotated.

The text model stands next to a vision tower (`qwen3_5`, `qwen3_5_moe`). With experts there is a shared one behind a gate.
"""

from typing import Any

MODEL_TYPES = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
WRAPPERS = ("qwen3_5", "qwen3_5_moe")
# The vision tower and the head that predicts further tokens.
CARRIED = ("model.visual.", "mtp.")
USED = {
    "attention_bias", "full_attention_interval", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim",
    "linear_num_key_heads", "linear_num_value_heads", "num_experts", "num_experts_per_tok", "norm_topk_prob",
    "moe_intermediate_size", "shared_expert_intermediate_size", "decoder_sparse_step", "mlp_only_layers",
}  # fmt: skip
FIXED = {"attn_output_gate": True, "output_gate_type": "swish"}
IMMATERIAL = {
    "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype", "output_router_logits", "router_aux_loss_coef",
}  # fmt: skip
DEFAULTS = {
    "head_dim": 256, "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
}  # fmt: skip
NAMES = {"shared": "shared_expert"}
PARTIAL_ROTARY = 0.25
OF_TYPE = {
    # Not read by transformers, which always makes the weights sum to 1.
    "qwen3_5_moe_text": {"FIXED": {**FIXED, "norm_topk_prob": True}},
    "qwen3_next": {"NAMES": {**NAMES, "delta_input": "in_proj_qkvz in_proj_ba"}},
}


def pieces(config: dict[str, Any]) -> dict[str, Any]:
    gated = {"query_key_norm": "head", "zero_centered_norm": True, "attention_gate": True}
    return {**gated, **dict.fromkeys(("qkv_bias", "output_bias"), bool(config.get("attention_bias")))}


def layer_types(config: dict[str, Any]) -> list[str]:
    interval, layers = int(config["full_attention_interval"]), range(int(config["num_hidden_layers"]))
    return ["linear_attention" if (layer + 1) % interval else "full_attention" for layer in layers]


def delta_net(config: dict[str, Any]) -> dict[str, int]:
    fields = {"key_dim": "key_head_dim", "value_dim": "value_head_dim", "kernel": "conv_kernel_dim"}
    fields |= {"num_key_heads": "num_key_heads", "num_value_heads": "num_value_heads"}
    return {field: int(config[f"linear_{name}"]) for field, name in fields.items()}


def moe(config: dict[str, Any]) -> dict[str, Any]:
    """Empty for a dense model: Qwen3-Next with 0 experts is one."""
    fields = {"num_experts": "num_experts", "experts_per_token": "num_experts_per_tok"}
    fields |= {"ffn_hidden_size": "moe_intermediate_size", "shared_width": "shared_expert_intermediate_size"}
    sizes: dict[str, Any] = {ours: int(config[name]) for ours, name in fields.items() if config.get("num_experts")}
    return sizes and {**sizes, "normalized": bool(config.get("norm_topk_prob", True)), "shared_gate": True}
