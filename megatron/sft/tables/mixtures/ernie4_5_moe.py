"""ERNIE 4.5 with experts: softmax scores with a correction bias, shared experts, and dense layers before and among them."""

from typing import Any

MODEL_TYPES = ("ernie4_5_moe",)
FIXED = {"use_bias": False, "moe_gate": "topk", "moe_gate_act": "softmax", "moe_use_aux_free": True}
# Of the program that the models were trained with, and of code that is not run.
IMMATERIAL = {
    "auto_map", "moe_capacity", "num_nextn_predict_layers", "output_router_logits", "router_aux_loss_coef", "use_rmsnorm",
    "fuse_rms_norm", "fuse_rope", "fuse_attn_ffn", "compression_ratio", "rope_reorder", "sequence_parallel", "moe_group",
    "moe_aux_loss_lambda", "moe_orthogonal_loss_lambda", "moe_z_loss_lambda", "moe_multimodal_dispatch_use_allgather",
    "multi_token_pred_lambda", "enable_mtp_magic_send", "hidden_dropout_prob", "attention_probs_dropout_prob",
}  # fmt: skip
USED = {
    "moe_num_experts", "moe_k", "moe_intermediate_size", "moe_num_shared_experts", "moe_layer_start_index",
    "moe_layer_end_index", "moe_layer_interval", "moe_norm_min",
}  # fmt: skip
DEFAULTS = {
    "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "moe_k": 6, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
    "moe_layer_end_index": -1, "moe_layer_interval": 1, "moe_norm_min": 1e-12,
}  # fmt: skip
# The head that predicts further tokens.
CARRIED = ("model.mtp_",)
NAMES = {
    "correction_bias": "moe_statics.e_score_correction_bias[1]",
    "fused_correction_bias": "gate.moe_statics.e_score_correction_bias",
}
PIECES = {"interleaved_rope": True}
ROPE_THETA = 5e5


def experts(config: dict[str, Any]) -> list[bool]:
    first, last, interval = (int(config[f"moe_layer_{name}"]) for name in ("start_index", "end_index", "interval"))
    num_layers = int(config["num_hidden_layers"])
    last = num_layers - 1 if last == -1 else last
    return [(layer + 1) % interval == 0 and first <= layer <= last for layer in range(num_layers)]


def moe(config: dict[str, Any]) -> dict[str, Any]:
    width = int(config["moe_intermediate_size"])
    return {
        "num_experts": int(config["moe_num_experts"]),
        "experts_per_token": int(config["moe_k"]),
        "ffn_hidden_size": width,
        "correction_bias": True,
        "normalized": True,
        "least_sum": float(config["moe_norm_min"]),
        "shared_width": int(config["moe_num_shared_experts"]) * width,
    }
