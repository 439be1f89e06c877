"""Seed-OSS 36B: Llama's architecture with biases on query, key and value."""

from typing import Any

MODEL_TYPES = ("seed_oss",)
FIXED = {"pretraining_tp": 1}
USED = {"attention_bias", "attention_out_bias", "mlp_bias"}
# Dropout of the first training, which is not used here.
IMMATERIAL = {"attention_dropout", "residual_dropout"}
DEFAULTS = {"head_dim": 128, "num_key_value_heads": 8, "attention_bias": True}


def pieces(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "qkv_bias": bool(config["attention_bias"]),
        "output_bias": bool(config.get("attention_out_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
    }
