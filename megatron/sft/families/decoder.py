"""The rows that every family of today shares: a decoder with RMSNorm, grouped-query attention and a gated MLP."""

from megatron.sft.families.rules import QKV, GateUp, Rule, Same

_HF_LAYER = "model.layers.{}."
_MEGATRON_LAYER = "decoder.layers.{}."


def attention_and_mlp() -> tuple[Rule, ...]:
    """One layer's weights. The norms carry the names of megatron-core's fused norm-linear layers, as its checkpoints do."""
    hf, megatron = _HF_LAYER, _MEGATRON_LAYER
    projections = (f"{hf}self_attn.{name}_proj.weight" for name in "qkv")
    return (
        Same(f"{megatron}self_attention.linear_qkv.layer_norm_weight", f"{hf}input_layernorm.weight"),
        QKV(f"{megatron}self_attention.linear_qkv.weight", *projections),
        Same(f"{megatron}self_attention.linear_proj.weight", f"{hf}self_attn.o_proj.weight"),
        Same(f"{megatron}mlp.linear_fc1.layer_norm_weight", f"{hf}post_attention_layernorm.weight"),
        GateUp(f"{megatron}mlp.linear_fc1.weight", f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight"),
        Same(f"{megatron}mlp.linear_fc2.weight", f"{hf}mlp.down_proj.weight"),
    )


def qkv_bias() -> tuple[Rule, ...]:
    """The biases of query, key and value, for families that have them."""
    projections = (f"{_HF_LAYER}self_attn.{name}_proj.bias" for name in "qkv")
    return (QKV(f"{_MEGATRON_LAYER}self_attention.linear_qkv.bias", *projections),)


def outer(tied_embeddings: bool) -> tuple[Rule, ...]:
    """Embedding, last norm and, where it is a matrix of its own, the output layer."""
    rules: tuple[Rule, ...] = (
        Same("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        Same("decoder.final_layernorm.weight", "model.norm.weight"),
    )
    return rules if tied_embeddings else (*rules, Same("output_layer.weight", "lm_head.weight"))
