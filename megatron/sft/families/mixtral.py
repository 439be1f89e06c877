"""Mixtral: Mistral with a mixture of experts in every layer, the weights of a token's experts summing to 1."""

from typing import Any

from megatron.sft.families import decoder
from megatron.sft.families.architecture import Architecture, MoEConfig
from megatron.sft.families.rules import Rule

MODEL_TYPE = "mixtral"
FIXED = {"router_jitter_noise": 0.0}
IMMATERIAL = {"output_router_logits", "router_aux_loss_coef"}
USED = {"num_local_experts", "num_experts_per_tok"}
SLIDING_WINDOW = True
DEFAULTS = {"rope_theta": 1e6, "num_key_value_heads": 8}


def moe(config: dict[str, Any]) -> MoEConfig:
    return MoEConfig(
        num_experts=int(config["num_local_experts"]),
        experts_per_token=int(config["num_experts_per_tok"]),
        ffn_hidden_size=int(config["intermediate_size"]),
        normalized=True,
    )


def rules(architecture: Architecture) -> tuple[Rule, ...]:
    experts = decoder.experts("block_sparse_moe", gate="w1", up="w3", down="w2")
    return (*decoder.outer(architecture), *decoder.attention(architecture), *experts)
