"""OLMo 2 and 3: norms after attention and MLP instead of before, and queries and keys normed over all heads.

OLMo 3 has a window in three of four layers, and scales the positions of the other layers only.
"""

from typing import Any

MODEL_TYPES = ("olmo2", "olmo3")
USED = {"attention_bias"}
DEFAULTS = {"rms_norm_eps": 1e-5}
PIECES = {"norms": "after", "query_key_norm": "projection"}


def pieces(config: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias"))
    return {"qkv_bias": bias, "output_bias": bias}


def _layer_types(config: dict[str, Any]) -> list[str]:
    layers = range(int(config["num_hidden_layers"]))
    return ["sliding_attention" if (layer + 1) % 4 else "full_attention" for layer in layers]


def _ropes(config: dict[str, Any]) -> dict[str, Any]:
    """transformers gives layers with a window the default base where config.json has the old spelling."""
    parameters = config.get("rope_parameters") or {}
    full = parameters.get("full_attention") or config.get("rope_scaling") or {}
    return {
        "full_attention": {"rope_theta": config.get("rope_theta"), **full},
        "sliding_attention": parameters.get("sliding_attention") or {},
    }


OF_TYPE = {
    "olmo3": {
        "DEFAULTS": {"rms_norm_eps": 1e-5, "sliding_window": 4096},
        "SLIDING_WINDOW": True,
        "ROPE_THETA": 5e5,
        "layer_types": _layer_types,
        "ropes": _ropes,
    }
}
