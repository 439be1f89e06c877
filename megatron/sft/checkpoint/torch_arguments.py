"""The arguments of Megatron-LM in a checkpoint of the `torch` format, which it checks, and `--use-checkpoint-args` reads."""

import argparse
from typing import Any

import torch

from megatron.sft.families.architecture import Architecture, MoEConfig
from megatron.sft.model.layout import Layout


def _router_arguments(moe: MoEConfig | None) -> dict[str, Any]:
    """Megatron-LM's arguments of the router. It has sigmoid scores normalised, and groups by their two best experts, only."""
    if moe is None:
        return {"moe_router_topk": 2, "moe_router_pre_softmax": False}
    return {
        "moe_router_topk": moe.experts_per_token,
        "moe_router_pre_softmax": not moe.normalized,
        "moe_router_score_function": moe.scores,
        "moe_router_enable_expert_bias": moe.correction_bias,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_num_groups": moe.num_groups if moe.num_groups > 1 else None,
        "moe_router_group_topk": moe.chosen_groups if moe.num_groups > 1 else None,
        "moe_router_topk_scaling_factor": moe.scale if moe.scale != 1.0 else None,
        "moe_shared_expert_intermediate_size": moe.shared_width or None,
        "moe_shared_expert_gate": moe.shared_gate,
    }


def megatron_arguments(architecture: Architecture, layout: Layout, iteration: int) -> argparse.Namespace:
    """Of this model in this layout."""
    stage_layers = layout.stage_layers(architecture)
    uneven = len(set(stage_layers)) > 1
    moe, rope = architecture.moe, architecture.ropes[0]
    llama3 = rope.scaling if rope.scaling and rope.scaling.kind == "llama3" else None
    return argparse.Namespace(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_heads,
        group_query_attention=architecture.num_kv_heads != architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        multi_latent_attention=architecture.latent is not None,
        qk_layernorm=architecture.query_key_norm is not None,
        window_size=(architecture.windows[0] - 1, 0) if architecture.windows else None,
        num_experts=moe.num_experts if moe else None,
        moe_ffn_hidden_size=moe.ffn_hidden_size if moe else None,
        **_router_arguments(moe),
        seq_length=architecture.max_positions,
        max_position_embeddings=architecture.max_positions,
        padded_vocab_size=layout.padded_vocab_size(architecture),
        make_vocab_size_divisible_by=1,
        tokenizer_type="HuggingFaceTokenizer",
        vocab_file=None,
        add_position_embedding=False,
        position_embedding_type="rope",
        rotary_base=int(rope.theta),
        rotary_percent=rope.dim / architecture.head_dim,
        use_rope_scaling=llama3 is not None,
        rope_scaling_factor=llama3.factor if llama3 else 8.0,
        normalization="RMSNorm",
        norm_epsilon=architecture.norm_epsilon,
        swiglu=True,
        add_bias_linear=architecture.output_bias and architecture.mlp_bias,
        add_qkv_bias=architecture.qkv_bias,
        untie_embeddings_and_output_weights=not architecture.tied_embeddings,
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        expert_model_parallel_size=layout.expert_parallel,
        virtual_pipeline_model_parallel_size=None,
        decoder_first_pipeline_num_layers=stage_layers[0] if uneven else None,
        decoder_last_pipeline_num_layers=stage_layers[-1] if uneven else None,
        data_parallel_random_init=False,
        params_dtype=architecture.torch_dtype,
        bf16=architecture.torch_dtype == torch.bfloat16,
        fp16=architecture.torch_dtype == torch.float16,
        apply_query_key_layer_scaling=False,
        attention_softmax_in_fp32=False,
        masked_softmax_fusion=False,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
        use_distributed_optimizer=False,
        ckpt_format="torch",
        iteration=iteration,
    )
