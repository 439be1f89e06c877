"""Phi-3 to Phi-4-mini: Llama's architecture with fused tensors, LongRoPE, and in Phi-4-mini partial rotation."""

MODEL_TYPES = ("phi3",)
FIXED = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_bias": False, "lm_head_bias": False, "mlp_bias": False}
USED = {"original_max_position_embeddings"}
# The folders have code as well, which is not run: transformers has the same model. Phi-4-mini's factor is read nowhere.
IMMATERIAL = {"auto_map", "interpolate_factor", "full_attn_mod"}
DEFAULTS = {"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
NAMES = {"qkv": "qkv_proj", "gate_up": "gate_up_proj"}
SLIDING_WINDOW = True
PARTIAL_ROTARY = 1.0
ROPE_ALIASES = {"su": "longrope", "yarn": "longrope"}
