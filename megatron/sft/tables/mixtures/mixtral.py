"""Mixtral: Mistral with a mixture of experts in every layer, the weights of a token's experts summing to 1."""

from typing import Any

MODEL_TYPES = ("mixtral",)
FIXED = {"router_jitter_noise": 0.0}
IMMATERIAL = {"output_router_logits", "router_aux_loss_coef"}
USED = {"num_local_experts", "num_experts_per_tok"}
SLIDING_WINDOW = True
NAMES = {"block": "block_sparse_moe", "expert_gate": "w1", "expert_up": "w3", "expert_down": "w2"}
DEFAULTS = {"num_key_value_heads": 8}
ROPE_THETA = 1e6


def moe(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": int(config["num_local_experts"]),
        "experts_per_token": int(config["num_experts_per_tok"]),
        "ffn_hidden_size": int(config["intermediate_size"]),
        "normalized": True,
    }
