"""Llama 2 to 3.2, SmolLM2, the DeepSeek-R1 distillations of Llama and models of their architecture."""

from typing import Any

MODEL_TYPES = ("llama",)
FIXED = {"pretraining_tp": 1}
USED = {"attention_bias", "mlp_bias"}
IMMATERIAL = {"is_llama_config", "rope_interleaved"}


def pieces(config: dict[str, Any]) -> dict[str, Any]:
    attention = bool(config.get("attention_bias"))
    return {"qkv_bias": attention, "output_bias": attention, "mlp_bias": bool(config.get("mlp_bias"))}
