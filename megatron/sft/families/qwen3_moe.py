"""Qwen3 with a mixture of experts in every layer."""

from typing import Any

from megatron.sft.families import decoder
from megatron.sft.families.architecture import Architecture, MoEConfig
from megatron.sft.families.rules import Rule

MODEL_TYPE = "qwen3_moe"
FIXED = {"attention_bias": False, "use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []}
IMMATERIAL = {"sliding_window", "max_window_layers", "output_router_logits", "router_aux_loss_coef"}
# transformers 5 calls num_experts num_local_experts.
USED = {"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}
QK_NORM = True


def moe(config: dict[str, Any]) -> MoEConfig:
    return MoEConfig(
        num_experts=int(config["num_experts"] if "num_experts" in config else config["num_local_experts"]),
        experts_per_token=int(config["num_experts_per_tok"]),
        ffn_hidden_size=int(config["moe_intermediate_size"]),
        normalized=bool(config.get("norm_topk_prob", False)),
    )


def rules(architecture: Architecture) -> tuple[Rule, ...]:
    experts = decoder.experts("mlp", gate="gate_proj", up="up_proj", down="down_proj")
    return (*decoder.outer(architecture), *decoder.attention(architecture), *experts)
