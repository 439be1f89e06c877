"""Llama 2 to 3.2, SmolLM2, the DeepSeek-R1 distillations of Llama, and models of their architecture: no biases."""

from megatron.sft.families import decoder

MODEL_TYPE = "llama"
FIXED = {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
IMMATERIAL = {"is_llama_config", "rope_interleaved"}
ROPE_SCALING = {"llama3"}
rules = decoder.table
