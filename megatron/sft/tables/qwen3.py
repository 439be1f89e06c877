"""Qwen3, dense: query and key are normed head by head, and there are no biases."""

MODEL_TYPES = ("qwen3",)
FIXED = {"attention_bias": False, "use_sliding_window": False}
IMMATERIAL = {"sliding_window", "max_window_layers"}
DEFAULTS = {"head_dim": 128}
PIECES = {"query_key_norm": "head"}
