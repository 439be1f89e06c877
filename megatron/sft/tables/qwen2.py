"""Qwen2, Qwen2.5 and the DeepSeek-R1 distillations of them: Llama's architecture with biases on query, key and value."""

MODEL_TYPES = ("qwen2",)
FIXED = {"use_sliding_window": False, "use_mrope": False}
# They have an effect only with use_sliding_window.
IMMATERIAL = {"sliding_window", "max_window_layers"}
PIECES = {"qkv_bias": True}
