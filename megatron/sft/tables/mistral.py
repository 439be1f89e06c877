"""Mistral 7B v0.1 to v0.3 and its like: Llama's architecture with, in v0.1, attention to the last 4,096 tokens only."""

MODEL_TYPES = ("mistral",)
SLIDING_WINDOW = True
DEFAULTS = {"sliding_window": 4096, "num_key_value_heads": 8}
