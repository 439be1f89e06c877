"""Qwen3.5, 3.6 and 3.8, dense: three of four layers are gated delta nets, the others have gated attention, a quarter rotated.

The text model stands next to a vision tower (`qwen3_5`). Qwen3-Next has the same layers; its experts are not built here.
"""

from typing import Any

MODEL_TYPES = ("qwen3_5_text", "qwen3_next")
WRAPPERS = ("qwen3_5",)
# The vision tower and the head that predicts further tokens.
CARRIED = ("model.visual.", "mtp.")
USED = {
    "attention_bias", "full_attention_interval", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim",
    "linear_num_key_heads", "linear_num_value_heads",
}  # fmt: skip
FIXED = {"attn_output_gate": True, "output_gate_type": "swish"}
IMMATERIAL = {"mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype"}
DEFAULTS = {
    "head_dim": 256, "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
}  # fmt: skip
PARTIAL_ROTARY = 0.25


def pieces(config: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias"))
    gated = {"query_key_norm": "head", "zero_centered_norm": True, "attention_gate": True}
    return {**gated, "qkv_bias": bias, "output_bias": bias}


def layer_types(config: dict[str, Any]) -> list[str]:
    interval, layers = int(config["full_attention_interval"]), range(int(config["num_hidden_layers"]))
    return ["linear_attention" if (layer + 1) % interval else "full_attention" for layer in layers]


def delta_net(config: dict[str, Any]) -> dict[str, int]:
    fields = {"key_dim": "key_head_dim", "value_dim": "value_head_dim", "kernel": "conv_kernel_dim"}
    fields |= {"num_key_heads": "num_key_heads", "num_value_heads": "num_value_heads"}
    return {field: int(config[f"linear_{name}"]) for field, name in fields.items()}


OF_TYPE = {
    "qwen3_next": {
        "NAMES": {"delta_input": "in_proj_qkvz in_proj_ba"},
        # Without experts only: 0 of them makes every layer dense.
        "FIXED": {"num_experts": 0, "attn_output_gate": True},
        "IMMATERIAL": {
            "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "shared_expert_intermediate_size",
            "num_experts_per_tok", "norm_topk_prob", "output_router_logits", "router_aux_loss_coef",
        },
    },
}  # fmt: skip
