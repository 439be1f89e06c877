"""config.json files of published models: read as transformers reads them, or refused with the reason.

Those without another source are the defaults of transformers' class for the family. Only the number of layers and the
vocabulary are made small, so that transformers' own model is built next to it in moments.
"""

import copy
from typing import Any

import pytest
import torch
import transformers

from megatron.sft.families.registry import read_architecture
from megatron.sft.families.weight_names import check_hf_names, checked_to_megatron, weight_entries
from megatron.sft.hf.block_scales import unquantised_config
from megatron.sft.planning.memory import num_parameters
from megatron.sft.runtime.errors import UserError
from tests.support import latent_configs
from tests.support.conversion_worker import on_disk_names

YARN = {"rope_type": "yarn", "type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
QWEN3_5_TEXT: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "dtype": "bfloat16", "eos_token_id": 248044,
    "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3584, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 16, "linear_value_head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": [],
    "model_type": "qwen3_5_text", "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False,
    "num_attention_heads": 8, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True, "use_cache": True, "vocab_size": 248320, "mamba_ssm_dtype": "float32",
    "rope_parameters": {
        "mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default", "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
    },
}  # fmt: skip
QWEN3_5: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"], "image_token_id": 248056, "model_type": "qwen3_5",
    "text_config": QWEN3_5_TEXT, "tie_word_embeddings": True, "transformers_version": "4.57.0.dev0",
    "video_token_id": 248057, "vision_end_token_id": 248054, "vision_start_token_id": 248053,
    "vision_config": {
        "deepstack_visual_indexes": [], "depth": 12, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 768, "in_channels": 3,
        "initializer_range": 0.02, "intermediate_size": 3072, "model_type": "qwen3_5", "num_heads": 12,
        "num_position_embeddings": 2304, "out_hidden_size": 1024, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}  # fmt: skip
GEMMA3: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3", "torch_dtype": "bfloat16",
    "text_config": {
        "hidden_size": 3840, "intermediate_size": 15360, "model_type": "gemma3_text", "num_attention_heads": 16,
        "num_hidden_layers": 48, "num_key_value_heads": 8, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip
GEMMA3_270M: dict[str, Any] = {
    "_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": 1, "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640, "initializer_range": 0.02, "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3, "max_position_embeddings": 32768,
    "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 18, "num_key_value_heads": 1,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0,
    "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512, "torch_dtype": "bfloat16",
    "transformers_version": "4.55.0.dev0", "use_bidirectional_attention": False, "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
R1_0528: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 12288, "max_position_embeddings": 131072, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attn_factor": 0.8782488562869419,
    },
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
PHI3_MINI: dict[str, Any] = {
    "_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"], "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
    "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "sliding_window": 2047, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.2",
    "use_cache": True, "attention_bias": False, "vocab_size": 32064,
}  # fmt: skip
PHI4_MINI: dict[str, Any] = {
    **PHI3_MINI, "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064, "max_position_embeddings": 131072,
    "tie_word_embeddings": True, "partial_rotary_factor": 0.75, "sliding_window": 262144, "full_attn_mod": 1,
    "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "eos_token_id": 199999, "pad_token_id": 199999,
    "bos_token_id": 199999,
    "rope_scaling": {
        "type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0 + 0.5 * pair for pair in range(48)],
    },
}  # fmt: skip
ERNIE: dict[str, Any] = {
    "architectures": ["Ernie4_5_ForCausalLM"], "auto_map": {"AutoModel": "modeling_ernie4_5.Ernie4_5_Model"}, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 131072,
    "model_type": "ernie4_5", "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128, "num_hidden_layers": 18,
    "pad_token_id": 0, "rms_norm_eps": 1e-05, "use_cache": False, "vocab_size": 103424, "rope_theta": 500000,
    "use_bias": False, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
HUNYUAN: dict[str, Any] = {
    "add_classification_head": False, "architectures": ["HunYuanDenseV1ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.1, "attention_head_dim": 128, "bos_token_id": 1, "cla_share_factor": 2, "class_num": 0,
    "dense_list": [4096, 0], "eos_token_id": 127960, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "im_end_id": 5, "im_newline_id": 11, "im_start_id": 4, "initializer_range": 0.02, "intermediate_size": 14336,
    "mask_init_id": 12, "max_position_embeddings": 32768, "mlp_bias": False, "model_type": "hunyuan_v1_dense",
    "norm_type": "rms", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "org_vocab_size": 128167, "pad_id": 127961, "pad_token_id": 127961, "pool_type": "last", "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "type": "dynamic",
    },
    "rope_theta": 10000.0, "sep_token_id": 127962, "text_end_id": 7, "text_start_id": 6, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.55.0.dev0", "use_cache": False, "use_cla": False,
    "use_qk_norm": True, "use_rotary_pos_emb": True, "vocab_size": 128167,
}  # fmt: skip
SMOLLM3: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": None,
    "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3",
    "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36,
    "num_key_value_heads": 4, "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 5000000.0, "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
SEED_OSS: dict[str, Any] = {
    "model_type": "seed_oss", "hidden_size": 5120, "num_hidden_layers": 64, "intermediate_size": 27648,
    "num_attention_heads": 80, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 0.000001, "vocab_size": 155136,
    "rope_theta": 10000000.0, "rope_scaling": {"rope_type": "default"}, "max_position_embeddings": 524288,
    "tie_word_embeddings": False, "attention_bias": True, "attention_out_bias": False, "attention_dropout": 0.1,
    "residual_dropout": 0.1, "mlp_bias": False,
}  # fmt: skip
GRANITE: dict[str, Any] = {
    "architectures": ["GraniteForCausalLM"], "model_type": "granite", "hidden_size": 2560, "num_hidden_layers": 40,
    "intermediate_size": 8192, "num_attention_heads": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 10.0, "residual_multiplier": 0.22,
    "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "rope_theta": 5000000.0, "vocab_size": 49155,
    "max_position_embeddings": 131072, "tie_word_embeddings": True,
}  # fmt: skip
OLMO3: dict[str, Any] = {
    "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "attention_bias": False, "attention_dropout": 0.0,
    "eos_token_id": 100257, "pad_token_id": 100277, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-06, "sliding_window": 4096, "rope_theta": 500000,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32.0, "beta_slow": 1.0,
        "attention_factor": 1.2079441541679836,
    },
    "tie_word_embeddings": False, "vocab_size": 100278, "dtype": "bfloat16", "transformers_version": "4.57.1",
}  # fmt: skip
GLM4: dict[str, Any] = {
    "model_type": "glm4", "architectures": ["Glm4ForCausalLM"], "hidden_size": 4096, "intermediate_size": 13696,
    "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151552,
    "tie_word_embeddings": False, "attention_bias": True, "attention_dropout": 0.0, "partial_rotary_factor": 0.5,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338], "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip
DEVSTRAL: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "dtype": "bfloat16",
    "image_token_index": 10, "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2,
    "vision_feature_layer": -1, "tie_word_embeddings": False,
    "text_config": {
        "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
        "intermediate_size": 32768, "max_position_embeddings": 393216, "model_type": "ministral3", "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "sliding_window": None, "vocab_size": 131072,
        "rope_parameters": {
            **YARN, "factor": 48.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8192,
            "rope_theta": 100000000.0,
        },
    },
    "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 24, "head_dim": 64},
    "quantization_config": {
        "activation_scheme": "static", "dequantize": False, "quant_method": "fp8", "weight_block_size": None,
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    },
}  # fmt: skip
GLM_4_5_AIR: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "partial_rotary_factor": 0.5, "initializer_range": 0.02, "intermediate_size": 10944, "max_position_embeddings": 131072,
    "model_type": "glm4_moe", "moe_intermediate_size": 1408, "norm_topk_prob": True, "num_attention_heads": 96,
    "n_group": 1, "topk_group": 1, "n_routed_experts": 128, "n_shared_experts": 1, "routed_scaling_factor": 1.0,
    "num_experts_per_tok": 8, "first_k_dense_replace": 1, "num_hidden_layers": 46, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000, "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.54.0", "use_cache": True,
    "use_qk_norm": False, "vocab_size": 151552,
}  # fmt: skip
QWEN1_5_MOE: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 5632, "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60,
    "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "output_router_logits": False,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
MINIMAX_M2: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"], "attn_type_list": [1] * 62, "hidden_act": "silu", "hidden_size": 3072,
    "head_dim": 128, "initializer_range": 0.02, "intermediate_size": 1536, "max_position_embeddings": 196608,
    "model_type": "minimax_m2", "mtp_transformer_layers": 1, "num_attention_heads": 48, "num_experts_per_tok": 8,
    "num_hidden_layers": 62, "num_key_value_heads": 8, "num_local_experts": 256, "num_mtp_modules": 3,
    "output_router_logits": False, "qk_norm_type": "per_layer", "rms_norm_eps": 1e-06, "rope_theta": 5000000,
    "rotary_dim": 64, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "scoring_func": "sigmoid",
    "shared_intermediate_size": 0, "sliding_window": None, "tie_word_embeddings": False, "use_cache": True,
    "use_mtp": True, "use_qk_norm": True, "use_routing_bias": True, "vocab_size": 200064, "torch_dtype": "bfloat16",
    "auto_map": {"AutoConfig": "configuration_minimax_m2.MiniMaxM2Config"},
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "float8_e4m3fn", "quant_method": "fp8", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    },
}  # fmt: skip
ERNIE_MOE: dict[str, Any] = {
    "architectures": ["Ernie4_5_MoeForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 2560, "intermediate_size": 12288, "max_position_embeddings": 131072, "model_type": "ernie4_5_moe",
    "num_attention_heads": 20, "num_key_value_heads": 4, "num_hidden_layers": 28, "pad_token_id": 0, "rms_norm_eps": 1e-05,
    "use_cache": False, "vocab_size": 103424, "rope_theta": 500000, "use_bias": False, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
    "moe_layer_end_index": 27, "moe_layer_interval": 1, "moe_intermediate_size": 1536, "moe_gate": "topk", "moe_k": 6,
    "moe_capacity": [64, 64, 64], "moe_use_aux_free": True, "num_nextn_predict_layers": 1,
    "auto_map": {"AutoModelForCausalLM": "modeling_ernie4_5_moe.Ernie4_5_MoeForCausalLM"},
}  # fmt: skip
GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "initializer_range": 0.02, "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
    "pad_token_id": 199999, "rms_norm_eps": 1e-05, "rope_theta": 150000, "router_aux_loss_coef": 0.9,
    "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0",
    "use_cache": True, "vocab_size": 201088,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
        "truncate": False,
    },
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
        "quant_method": "mxfp4",
    },
}  # fmt: skip
QWEN3_NEXT: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5120, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
    "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_next", "moe_intermediate_size": 512,
    "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 512, "num_experts_per_tok": 10,
    "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": False, "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_5_MOE: dict[str, Any] = {
    **QWEN3_5, "model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "tie_word_embeddings": False,
    "text_config": {
        **{name: value for name, value in QWEN3_5_TEXT.items() if name != "intermediate_size"},
        "model_type": "qwen3_5_moe_text", "hidden_size": 2048, "num_attention_heads": 16, "num_hidden_layers": 40,
        "linear_num_value_heads": 32, "moe_intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 8,
        "output_router_logits": False, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
OLMOE: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
    "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 1024,
    "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
    "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 50304,
}  # fmt: skip


def of_class(name: str, **changes: Any) -> dict[str, Any]:
    """The defaults of transformers' class, as it writes them."""
    config: dict[str, Any] = getattr(transformers, f"{name}Config")(**changes).to_dict()
    return config


# Where each stands in public; those without a source were written down from the files that the hub has.
ACCEPTED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3.5-0.8B, as the hub gave it in May 2026": QWEN3_5,
    "the same with output_gate_type, as in Qwen3.5-27B's": {
        **QWEN3_5,
        "text_config": {**QWEN3_5_TEXT, "output_gate_type": "swish", "partial_rotary_factor": 0.25},
    },
    "google/gemma-3-12b-it, in a public text encoder of a video model": GEMMA3,
    "google/gemma-3-270m, in circuit-tracer's tests": GEMMA3_270M,
    "google/gemma-3-4b-it as transformers 5 rewrites it, in a validator of TranslateGemma": {
        **GEMMA3,
        "text_config": {
            **GEMMA3["text_config"],
            "rope_scaling": None,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_parameters": {
                "full_attention": {"factor": 8.0, "rope_type": "linear"},
                "sliding_attention": {"rope_type": "default"},
            },
        },
    },
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B, in a public report to vLLM": R1_0528,
    "microsoft/Phi-3-mini-4k-instruct, in onnx-tool's examples": PHI3_MINI,
    "microsoft/Phi-4-mini-instruct, with other factors": PHI4_MINI,
    "baidu/ERNIE-4.5-0.3B, a copy of the folder": ERNIE,
    "tencent/HunyuanImage-2.1's reprompt model, in a public estimate of speed": HUNYUAN,
    "tencent/Hunyuan-MT-7B, in tests of a Swift port": {
        **{name: HUNYUAN[name] for name in HUNYUAN if name not in ("cla_share_factor", "dense_list", "class_num")},
        "rope_scaling": {**HUNYUAN["rope_scaling"], "alpha": 100000.0},
        "vocab_size": 128256,
    },
    "HuggingFaceTB/SmolLM3-3B": SMOLLM3,
    "ByteDance-Seed/Seed-OSS-36B-Instruct, in tests of a Swift port": SEED_OSS,
    "ibm-granite/granite-4.1-3b, in tests of larql": GRANITE,
    "allenai/Olmo-3-7B, in tests of imp": OLMO3,
    "THUDM/GLM-4-9B-0414": GLM4,
    "mistralai/Devstral-Small-2-24B in 8 bits, in tests of imp": DEVSTRAL,
    "OLMo 2: defaults of the class": of_class("Olmo2"),
    "Mistral 3: defaults of the class": of_class("Mistral3", tie_word_embeddings=False),
    **latent_configs.CONFIGS,
    "DeepSeek-V3: defaults of the class": of_class("DeepseekV3"),
    "GLM-4.7-Flash: defaults of the class": of_class("Glm4MoeLite"),
    "Qwen3-Next without experts: defaults of the class": of_class("Qwen3Next", num_experts=0),
    "zai-org/GLM-4.5-Air": GLM_4_5_AIR,
    "GLM-4.5 with the fields of a public conversion": {
        **GLM_4_5_AIR,
        "topk_method": "noaux_tc",
        "moe_router_dtype": "float32",
        "decoder_sparse_step": 1,
        "use_qk_norm": True,
        "hidden_size": 5120,
        "router_aux_loss_coef": 0.001,
    },
    "Qwen/Qwen1.5-MoE-A2.7B": QWEN1_5_MOE,
    "MiniMaxAI/MiniMax-M2, in 8 bits": MINIMAX_M2,
    "baidu/ERNIE-4.5-21B-A3B-PT": ERNIE_MOE,
    "openai/gpt-oss-20b, in MXFP4": GPT_OSS_20B,
    "Qwen/Qwen3-Next-80B-A3B-Instruct": QWEN3_NEXT,
    "Qwen/Qwen3.5-35B-A3B": QWEN3_5_MOE,
    "allenai/OLMoE-1B-7B-0924": OLMOE,
    **{
        f"{name}: defaults of the class": of_class(name)
        for name in ("Qwen2Moe", "MiniMaxM2", "Ernie4_5_Moe", "GptOss", "Olmoe", "Qwen3Next", "Qwen3_5MoeText")
    },
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "OLMoE with clipped queries": ("clip_qkv=8.0 is not supported for olmoe", {**OLMOE, "clip_qkv": 8.0}),
    "gpt-oss with another limit": ("swiglu_limit=8.0 is not supported for gpt_oss", {**GPT_OSS_20B, "swiglu_limit": 8.0}),
    "GLM-4.5 with another router": ("scoring_func='softmax' is not supported", {**GLM_4_5_AIR, "scoring_func": "softmax"}),
    "ERNIE without its correction": ("moe_use_aux_free=False is not", {**ERNIE_MOE, "moe_use_aux_free": False}),
    "MiniMax with noise in the router": ("router_jitter_noise=0.1 is not", {**MINIMAX_M2, "router_jitter_noise": 0.1}),
    "groups that do not divide the experts": ("1 of 3 groups of 128 experts are not possible", {**GLM_4_5_AIR, "n_group": 3}),
    "more experts a token than there are": ("65 experts a token of 64", {**OLMOE, "num_experts_per_tok": 65}),
    "Kimi K2.5's text model in four bits, in public tests": (
        "quantization_config={'quant_method': 'compressed-tensors'} is not supported",
        {**latent_configs.KIMI_K2, "quantization_config": {"quant_method": "compressed-tensors"}},
    ),
    "DeepSeek-V3.2: its indexer": ("index_topk=2048 is not supported", {**latent_configs.DEEPSEEK_V3, "index_topk": 2048}),
    "DeepSeek-V2 with normed weights, which transformers does not read": (
        "norm_topk_prob=True is not supported for deepseek_v2",
        {**latent_configs.DEEPSEEK_V2, "norm_topk_prob": True},
    ),
    "Moonlight with fewer keys than queries": (
        "num_key_value_heads=4 with latent attention of 16 heads",
        {**latent_configs.MOONLIGHT, "num_key_value_heads": 4},
    ),
    "Qwen3.5-27B in four bits, in tests of Unsloth": (
        "quantization_config={'quant_method': 'quark'} is not supported",
        {**QWEN3_5, "quantization_config": {"quant_method": "quark"}},
    ),
    "Gemma 3 with Gemma 2's capped scores": (
        "attn_logit_softcapping=50.0 is not supported for gemma3_text",
        {**GEMMA3_270M, "attn_logit_softcapping": 50.0},
    ),
    "Phi-4-mini with factors of all dimensions": (
        "longrope has 64 short and 64 long factors, a head has 48 rotated pairs",
        {**PHI4_MINI, "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [1.0] * 64}},
    ),
}


def small(config: dict[str, Any]) -> dict[str, Any]:
    """Eight layers and a small vocabulary."""
    config = copy.deepcopy(config)
    text = config.get("text_config", config)
    text["num_hidden_layers"], text["vocab_size"] = 8, 300
    for field in ("layer_types", "no_rope_layers", "mlp_layer_types"):
        if text.get(field):
            text[field] = text[field][:8]
    return config


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_published_configuration_gives_transformers_own_weights(name: str) -> None:
    config = unquantised_config(ACCEPTED[name], name)
    assert read_architecture(config, name).num_layers == config.get("text_config", config)["num_hidden_layers"]
    config = small(config)
    architecture = read_architecture(config, name)
    text = config.get("text_config", config)
    model_type = text.get("model_type", architecture.family).replace("kimi_k2", "deepseek_v3")
    if "text_config" in config:
        text = {**text, "tie_word_embeddings": architecture.tied_embeddings}
    # Ids of tokens are beyond the small vocabulary.
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    theirs = transformers.CONFIG_MAPPING[model_type].from_dict({**text, **ids})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    parameters = {key: parameter for key, parameter in model.named_parameters() if not key.startswith("mtp")}
    # transformers has the correction bias of routers as a buffer, but for ERNIE's.
    buffers = {key: buffer for key, buffer in model.named_buffers() if key.endswith("e_score_correction_bias")}
    buffers |= {key: parameters.pop(key) for key in list(parameters) if key.endswith("e_score_correction_bias")}
    shapes = on_disk_names({**parameters, **buffers}, architecture)
    check_hf_names(architecture, set(shapes), name)
    for entry in weight_entries(architecture):
        parameter = checked_to_megatron(entry, architecture, [shapes[key] for key in entry.hf], name)
        back = entry.rule.to_hf(architecture, parameter)
        assert [tensor.shape for tensor in back] == [shapes[key].shape for key in entry.hf]
    assert num_parameters(architecture) == sum(parameter.numel() for parameter in parameters.values())


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_built_is_refused_with_the_reason(name: str) -> None:
    reason, config = REFUSED[name]
    with pytest.raises(UserError) as error:
        read_architecture(unquantised_config(config, name), name)
    assert reason in str(error.value)
