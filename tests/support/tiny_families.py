"""Tiny random models of every family and of its variants."""

from pathlib import Path

from tests.support.tiny import VOCAB_SIZE, save_random


def save_family(folder: Path, family: str) -> Path:
    """A random model of one architecture, float32 (bfloat16 for `*_bf16`), with an odd vocabulary."""
    import torch
    import transformers

    name, changes = FAMILIES[family]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes |= {"num_hidden_layers": 5, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 512}
    # transformers gives the embedding of the padding token no gradient.
    sizes |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = getattr(transformers, f"{name}Config")(**{**sizes, "tie_word_embeddings": False, **changes})
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    return save_random(model, folder, torch.bfloat16 if family.endswith("_bf16") else None)


def has_experts(family: str) -> bool:
    """Whether one of FAMILIES is a mixture of experts."""
    return any(
        name.endswith(("num_experts", "num_local_experts", "n_routed_experts")) and count
        for name, count in FAMILIES[family][1].items()
    )


_LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
# Queries and keys of 24 dimensions, 8 of them rotated, values of 12; short positions, so that YaRN's corrections show.
_LATENT = {
    "num_key_value_heads": 8,
    "q_lora_rank": 28,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 2,
    "rope_parameters": {**_YARN, "mscale": 0.6, "mscale_all_dim": 0.8},
}
_DELTA_NET = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    # With less a head's tiny result is normed up, and with it what transformers' own float32 is off (1e-3 of the logits).
    "rms_norm_eps": 5e-2,
}
_GATED_EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen2_4_layers": ("Qwen2", {"num_hidden_layers": 4}),
    "qwen2_tied_bf16": ("Qwen2", {"tie_word_embeddings": True}),
    "llama2_bf16": ("Llama", {"num_key_value_heads": 8, "rms_norm_eps": 1e-5}),
    "llama3": ("Llama", {"rope_parameters": {**_LLAMA3_ROPE, "original_max_position_embeddings": 8192}}),
    # Other values than Llama 3.1's, so short that the scaling bends within a few positions; tied as in Llama 3.2.
    "llama32_tied": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "head_dim": 16,
            "rope_parameters": {
                **_LLAMA3_ROPE,
                "rope_theta": 1e4,
                "factor": 32.0,
                "low_freq_factor": 1.5,
                "high_freq_factor": 6.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral_window": ("Mistral", {"sliding_window": 24, "head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen3_bf16": ("Qwen3", {"head_dim": 32}),
    "qwen3_tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 16},
    ),
    "qwen3_moe_unnormalised": (
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": False,
            "head_dim": 16,
            "mlp_only_layers": [3],
        },
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "norm_topk_prob": False,
            "mlp_only_layers": [2],
        },
    ),
    "glm4_moe_bf16": (
        "Glm4Moe",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "head_dim": 16,
            "attention_bias": True,
            "use_qk_norm": True,
        },
    ),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "minimax_m2_moe": (
        "MiniMaxM2",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "intermediate_size": 32,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            "moe_num_experts": 8,
            "moe_k": 3,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 2,
            "num_hidden_layers": 5,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 3,
            "moe_layer_interval": 2,
            "moe_norm_min": 0.4,
        },
    ),
    "qwen3_5_moe": ("Qwen3_5MoeText", {"head_dim": 32, **_DELTA_NET, **_GATED_EXPERTS}),
    "qwen3_next_moe": ("Qwen3Next", {"head_dim": 32, **_DELTA_NET, **_GATED_EXPERTS, "mlp_only_layers": [1]}),
    "gpt_oss": (
        "GptOss",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "intermediate_size": 32,
            "head_dim": 16,
            "sliding_window": 24,
            "rope_parameters": {**_YARN, "truncate": False},
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "seed_oss": ("SeedOss", {"head_dim": 16, "attention_out_bias": True, "attention_dropout": 0.0, "residual_dropout": 0.0}),
    "smollm3": ("SmolLM3", {}),
    "granite": (
        "Granite",
        {"embedding_multiplier": 12.0, "logits_scaling": 4.0, "residual_multiplier": 0.22, "attention_multiplier": 0.25},
    ),
    "ernie4_5": ("Ernie4_5", {"head_dim": 16, "use_bias": True}),
    "hunyuan_v1_dense": (
        "HunYuanDenseV1",
        {"head_dim": 16, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}},
    ),
    "ministral3": (
        "Ministral3",
        {"head_dim": 16, "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "olmo2": ("Olmo2", {"head_dim": 16}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 24,
            "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": _YARN},
        },
    ),
    "phi3": (
        "Phi3",
        {
            "sliding_window": 24,
            "original_max_position_embeddings": 48,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.5, 2.0],
                "long_factor": [1.0, 4.0, 9.0],
            },
        },
    ),
    "glm4": ("Glm4", {"head_dim": 16}),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 24,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
            "final_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 6,
        },
    ),
    "deepseek_v2_moe": ("DeepseekV2", {**_LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy"}),
    # Moonlight: no vector for queries, no groups.
    "moonlight_moe_bf16": (
        "DeepseekV3",
        {**_LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "deepseek_v3_moe": ("DeepseekV3", {**_LATENT, "attention_bias": True}),
    # As in GLM-4.7-Flash values are as wide as queries and keys.
    "glm4_moe_lite": (
        "Glm4MoeLite",
        {
            **{name: value for name, value in _LATENT.items() if name != "first_k_dense_replace"},
            "v_head_dim": 24,
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse", "sparse"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "rope_interleave": False,
        },
    ),
    "qwen3_5": ("Qwen3_5Text", {"head_dim": 32, **_DELTA_NET}),
    "qwen3_next": ("Qwen3Next", {"head_dim": 32, **_DELTA_NET, "num_experts": 0}),
}
