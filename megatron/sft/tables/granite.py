"""Granite 3 and 4, dense: Llama's architecture with four multipliers."""

from typing import Any

MODEL_TYPES = ("granite",)
USED = {
    "attention_bias", "mlp_bias", "embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier",
}  # fmt: skip


def pieces(config: dict[str, Any]) -> dict[str, Any]:
    attention = bool(config.get("attention_bias"))
    return {
        "qkv_bias": attention,
        "output_bias": attention,
        "mlp_bias": bool(config.get("mlp_bias")),
        "embedding_scale": float(config.get("embedding_multiplier", 1.0)),
        "logit_scale": 1.0 / float(config.get("logits_scaling", 1.0)),
        "residual_scale": float(config.get("residual_multiplier", 1.0)),
        "attention_scale": float(config.get("attention_multiplier", 1.0)),
    }
