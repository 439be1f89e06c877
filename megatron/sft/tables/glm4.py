"""GLM-4-0414, dense: norms before and after, a fused gate and up projection, half of a head rotated in neighboring pairs."""

from typing import Any

MODEL_TYPES = ("glm4",)
USED = {"attention_bias"}
DEFAULTS = {"head_dim": 128, "num_key_value_heads": 2, "attention_bias": True, "rms_norm_eps": 1.5625e-07}
NAMES = {
    "gate_up": "gate_up_proj",
    "attention_output_norm": "post_self_attn_layernorm",
    "mlp_output_norm": "post_mlp_layernorm",
}
PARTIAL_ROTARY = 0.5


def pieces(config: dict[str, Any]) -> dict[str, Any]:
    return {"norms": "both", "interleaved_rope": True, "qkv_bias": bool(config["attention_bias"])}
