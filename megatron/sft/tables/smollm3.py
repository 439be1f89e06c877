"""SmolLM3: Llama's architecture without positions in every fourth layer."""

from typing import Any

MODEL_TYPES = ("smollm3",)
FIXED = {"use_sliding_window": False}
USED = {"no_rope_layers", "no_rope_layer_interval", "attention_bias", "mlp_bias"}
IMMATERIAL = {"sliding_window", "max_window_layers", "pretraining_tp"}
DEFAULTS = {"num_key_value_heads": 4, "tie_word_embeddings": True, "no_rope_layer_interval": 4}
ROPE_THETA = 2e6


def rotated(config: dict[str, Any]) -> list[bool]:
    given = config.get("no_rope_layers")  # 1 where a layer has them
    interval, num_layers = int(config["no_rope_layer_interval"]), int(config["num_hidden_layers"])
    return [bool(given[layer]) if given else (layer + 1) % interval != 0 for layer in range(num_layers)]


def pieces(config: dict[str, Any]) -> dict[str, Any]:
    attention = bool(config.get("attention_bias"))
    return {"qkv_bias": attention, "output_bias": attention, "mlp_bias": bool(config.get("mlp_bias"))}
