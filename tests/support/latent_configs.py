"""config.json files of published models with multi-head latent attention."""

from typing import Any

_COMMON: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "moe_layer_freq": 1,
    "norm_topk_prob": True, "pretraining_tp": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "kv_lora_rank": 512,
    "v_head_dim": 128, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "aux_loss_alpha": 0.001, "seq_aux": True, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
}  # fmt: skip
_YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
_BLOCKS = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
DEEPSEEK_V2_LITE: dict[str, Any] = {
    **_COMMON, "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "bos_token_id": 100000,
    "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944,
    "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "rope_theta": 10000, "routed_scaling_factor": 1.0,
    "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy", "transformers_version": "4.33.1",
    "vocab_size": 102400, "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip
DEEPSEEK_V2: dict[str, Any] = {
    **DEEPSEEK_V2_LITE, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8,
    "n_routed_experts": 160, "num_attention_heads": 128, "num_key_value_heads": 128, "num_hidden_layers": 60,
    "q_lora_rank": 1536, "routed_scaling_factor": 16.0, "topk_group": 3, "topk_method": "group_limited_greedy", "ep_size": 1,
}  # fmt: skip
DEEPSEEK_V3: dict[str, Any] = {
    **_COMMON, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_size": 7168,
    "intermediate_size": 18432, "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_attention_heads": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "quantization_config": _BLOCKS, "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "rope_theta": 10000,
    "routed_scaling_factor": 2.5, "topk_group": 4, "transformers_version": "4.33.1", "vocab_size": 129280,
}  # fmt: skip
MOONLIGHT: dict[str, Any] = {
    **_COMMON, "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1, "hidden_size": 2048,
    "intermediate_size": 11264, "max_position_embeddings": 8192, "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "q_lora_rank": None,
    "rms_norm_eps": 1e-05, "rope_theta": 50000.0, "routed_scaling_factor": 2.446, "topk_group": 1,
    "transformers_version": "4.48.3", "vocab_size": 163840,
}  # fmt: skip
KIMI_K2: dict[str, Any] = {
    **_COMMON, "model_type": "kimi_k2", "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1,
    "hidden_size": 7168, "intermediate_size": 18432, "max_position_embeddings": 131072, "moe_intermediate_size": 2048,
    "n_group": 1, "n_routed_experts": 384, "n_shared_experts": 1, "num_attention_heads": 64, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "q_lora_rank": 1536,
    "quantization_config": _BLOCKS, "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "topk_group": 1,
    "transformers_version": "4.48.3", "vocab_size": 163840,
    "rope_scaling": {**_YARN, "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
GLM_4_7_FLASH: dict[str, Any] = {
    "architectures": ["Glm4MoeLiteForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "dtype": "bfloat16",
    "eos_token_id": [154820, 154827, 154829], "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 10240, "kv_lora_rank": 512, "max_position_embeddings": 202752, "model_type": "glm4_moe_lite",
    "moe_intermediate_size": 1536, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 20, "num_experts_per_tok": 4, "num_hidden_layers": 47, "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1, "pad_token_id": 154820, "partial_rotary_factor": 1.0, "q_lora_rank": 768,
    "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
    "routed_scaling_factor": 1.8, "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc",
    "transformers_version": "5.0.0rc0", "v_head_dim": 256, "vocab_size": 154880,
}  # fmt: skip
CONFIGS = {
    "deepseek-ai/DeepSeek-V2-Lite": DEEPSEEK_V2_LITE,
    "deepseek-ai/DeepSeek-V2, its size": DEEPSEEK_V2,
    "deepseek-ai/DeepSeek-V3 (R1 and V3.1 alike), in 8 bits": DEEPSEEK_V3,
    "moonshotai/Moonlight-16B-A3B": MOONLIGHT,
    "moonshotai/Kimi-K2-Instruct, in 8 bits": KIMI_K2,
    "zai-org/GLM-4.7-Flash, most of it in vLLM's tests": GLM_4_7_FLASH,
}
