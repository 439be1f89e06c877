"""Hunyuan 0.5B to 7B, dense: queries and keys are normed head by head after their rotation."""

from typing import Any

MODEL_TYPES = ("hunyuan_v1_dense",)
FIXED = {"pretraining_tp": 1}
USED = {"attention_bias"}
IMMATERIAL = {"eod_token_id"}
DEFAULTS = {"rms_norm_eps": 1e-5}
NAMES = {"query_norm": "self_attn.query_layernorm", "key_norm": "self_attn.key_layernorm"}
# `dynamic` with a fixed alpha, whatever the length of a conversation.
ROPE_FIELDS = ("alpha",)


def pieces(config: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias"))
    return {"query_key_norm": "rotated head", "qkv_bias": bias, "output_bias": bias}
