"""Llama and models of its architecture: no biases, plain rotary positions."""

from megatron.sft.families import decoder
from megatron.sft.families.rules import Rule, Shape

MODEL_TYPE = "llama"
# Values that the architecture built here implies. Another value in config.json is refused by name.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
QKV_BIAS = False


def rules(shape: Shape) -> tuple[Rule, ...]:
    return (*decoder.outer(shape.tied_embeddings), *decoder.attention_and_mlp())
