"""Hunyuan 0.5B to 7B, dense: queries and keys are normed head by head after their rotation."""

from typing import Any

MODEL_TYPES = ("hunyuan_v1_dense",)
FIXED = {
    "pretraining_tp": 1, "use_cla": False, "use_qk_norm": True, "use_rotary_pos_emb": True, "add_classification_head": False,
    "mlp_bias": False,
}  # fmt: skip
USED = {"attention_bias"}
# Of the program that the models were trained with, and a dropout that is not used here.
IMMATERIAL = {
    "attention_dropout", "attention_head_dim", "auto_map", "cla_share_factor", "class_num", "dense_list", "eod_token_id",
    "im_end_id", "im_newline_id", "im_start_id", "mask_init_id", "norm_type", "org_vocab_size", "pad_id", "pool_type",
    "text_end_id", "text_start_id",
}  # fmt: skip
DEFAULTS = {"rms_norm_eps": 1e-5}
NAMES = {"query_norm": "self_attn.query_layernorm", "key_norm": "self_attn.key_layernorm"}
# `dynamic` with a fixed alpha, whatever the length of a conversation.
ROPE_FIELDS = ("alpha",)


def pieces(config: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias"))
    return {"query_key_norm": "rotated head", "qkv_bias": bias, "output_bias": bias}
