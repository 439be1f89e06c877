"""Qwen2, Qwen2.5 and the DeepSeek-R1 distillations of them: Llama's architecture with biases on query, key and value."""

from megatron.sft.families import decoder
from megatron.sft.families.rules import Rule, Shape

MODEL_TYPE = "qwen2"
FIXED = {"hidden_act": "silu", "use_sliding_window": False}
QKV_BIAS = True


def rules(shape: Shape) -> tuple[Rule, ...]:
    return (*decoder.outer(shape.tied_embeddings), *decoder.attention_and_mlp(), *decoder.qkv_bias())
