"""Qwen3, dense: query and key are normed head by head, and there are no biases."""

from megatron.sft.families import decoder

MODEL_TYPE = "qwen3"
FIXED = {"attention_bias": False, "use_sliding_window": False}
IMMATERIAL = {"sliding_window", "max_window_layers"}
DEFAULTS = {"head_dim": 128}
QK_NORM = True
rules = decoder.table
