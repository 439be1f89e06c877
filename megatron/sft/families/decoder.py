"""The rows that every family of today shares: a decoder with RMSNorm, grouped-query attention and a gated MLP."""

from megatron.sft.families.architecture import Shape
from megatron.sft.families.rules import QKV, GateUp, Rule, Same

_HF = "model.layers.{layer}."
_MEGATRON = "decoder.layers.{layer}."


def table(shape: Shape) -> tuple[Rule, ...]:
    """The whole table of a dense model: biases, norms of query and key, and an output layer where `shape` has them."""
    return (*outer(shape), *attention(shape), *mlp())


def outer(shape: Shape) -> tuple[Rule, ...]:
    """Embedding, last norm and, where it is a matrix of its own, the output layer."""
    rules: tuple[Rule, ...] = (
        Same("embedding.word_embeddings.weight", "model.embed_tokens.weight", split=0),
        Same("decoder.final_layernorm.weight", "model.norm.weight"),
    )
    return rules if shape.tied_embeddings else (*rules, Same("output_layer.weight", "lm_head.weight", split=0))


def attention(shape: Shape) -> tuple[Rule, ...]:
    """One layer's attention with its norm, which bears megatron-core's name for the norm fused with linear_qkv."""
    ours, theirs = f"{_MEGATRON}self_attention.", f"{_HF}self_attn."
    rules: tuple[Rule, ...] = (
        Same(f"{ours}linear_qkv.layer_norm_weight", f"{_HF}input_layernorm.weight"),
        QKV(f"{ours}linear_qkv.weight", *_projections("weight")),
        Same(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight", split=1),
    )
    if shape.qkv_bias:
        rules += (QKV(f"{ours}linear_qkv.bias", *_projections("bias")),)
    if shape.qk_norm:
        rules += tuple(Same(f"{ours}{name}_layernorm.weight", f"{theirs}{name}_norm.weight") for name in "qk")
    return rules


def _projections(kind: str) -> tuple[str, str, str]:
    attention = f"{_HF}self_attn."
    return f"{attention}q_proj.{kind}", f"{attention}k_proj.{kind}", f"{attention}v_proj.{kind}"


def mlp() -> tuple[Rule, ...]:
    """One layer's MLP with its norm, which bears megatron-core's name for the norm fused with linear_fc1."""
    ours, theirs = f"{_MEGATRON}mlp.", f"{_HF}mlp."
    return (
        Same(f"{ours}linear_fc1.layer_norm_weight", f"{_HF}post_attention_layernorm.weight"),
        GateUp(f"{ours}linear_fc1.weight", f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"),
        Same(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight", split=1),
    )


def experts(block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """One layer's mixture of experts: `block` is Hugging Face's name of it, the others those of an expert's projections."""
    ours, theirs = f"{_MEGATRON}mlp.", f"{_HF}{block}."
    one, hf_one = f"{ours}experts.experts.{{expert}}.", f"{theirs}experts.{{expert}}."
    return (
        Same(f"{_MEGATRON}pre_mlp_layernorm.weight", f"{_HF}post_attention_layernorm.weight"),
        Same(f"{ours}router.weight", f"{theirs}gate.weight"),
        GateUp(f"{one}linear_fc1.weight", f"{hf_one}{gate}.weight", f"{hf_one}{up}.weight"),
        Same(f"{one}linear_fc2.weight", f"{hf_one}{down}.weight", split=1),
    )
