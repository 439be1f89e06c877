"""Gemma 3: norms before and after, of weight 1 + w, GeGLU, scaled embeddings, and windows in five of six layers.

Layers with a window have another base of rotation. From 4B on a vision tower stands next to the text model (`gemma3`).
"""

from typing import Any

MODEL_TYPES = ("gemma3_text",)
WRAPPERS = ("gemma3",)
CARRIED = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
FIXED = {"hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None, "use_bidirectional_attention": False}
USED = {
    "attention_bias", "query_pre_attn_scalar", "final_logit_softcapping", "sliding_window_pattern",
    "_sliding_window_pattern", "rope_local_base_freq",
}  # fmt: skip
IMMATERIAL = {"cache_implementation", "hidden_act"}
DEFAULTS = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "head_dim": 256,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "sliding_window": 4096,
}  # fmt: skip
NAMES = {"mlp_norm": "pre_feedforward_layernorm"}
SLIDING_WINDOW = True


def pieces(config: dict[str, Any]) -> dict[str, Any]:
    bias, cap = bool(config.get("attention_bias")), config.get("final_logit_softcapping")
    return {
        "norms": "both",
        "zero_centered_norm": True,
        "activation": "gelu_tanh",
        "query_key_norm": "head",
        "embedding_scale": float(config["hidden_size"]) ** 0.5,
        "attention_scale": float(config["query_pre_attn_scalar"]) ** -0.5,
        "logit_cap": None if cap is None else float(cap),
        "qkv_bias": bias,
        "output_bias": bias,
    }


def layer_types(config: dict[str, Any]) -> list[str]:
    pattern, layers = int(config.get("sliding_window_pattern") or 6), range(int(config["num_hidden_layers"]))
    return ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in layers]


def ropes(config: dict[str, Any]) -> dict[str, Any]:
    new = config.get("rope_parameters") or {}
    full = new.get("full_attention") or config.get("rope_scaling") or {}
    bases = {"full_attention": config.get("rope_theta") or 1e6, "sliding_attention": config.get("rope_local_base_freq") or 1e4}
    given = {"full_attention": full, "sliding_attention": new.get("sliding_attention") or {}}
    return {kind: {"rope_theta": bases[kind], **given[kind]} for kind in bases}
