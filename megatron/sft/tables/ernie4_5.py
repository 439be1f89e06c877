"""ERNIE 4.5, dense: Llama's architecture with neighboring dimensions as rotated pairs."""

from typing import Any

MODEL_TYPES = ("ernie4_5",)
USED = {"use_bias"}
# The first folders have code as well, which is not run: transformers has the same model.
IMMATERIAL = {"auto_map"}
DEFAULTS = {"head_dim": 128, "num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
ROPE_THETA = 5e5


def pieces(config: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("use_bias"))
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bias, "interleaved_rope": True}
