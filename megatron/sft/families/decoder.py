"""Rules that families share: a decoder with RMSNorm, grouped-query attention, and a gated MLP or experts.

A family that differs in one part combines these functions with its own rules (see mixtral.py).
"""

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.rules import QKV, GateUp, Rename, Rule

_HF = "model.layers.{layer}."
_MEGATRON = "decoder.layers.{layer}."


def table(architecture: Architecture) -> tuple[Rule, ...]:
    """The whole table of a dense model: biases, norms of query and key, and an output layer where the architecture has them."""
    return (*outer(architecture), *attention(architecture), *mlp())


def outer(architecture: Architecture) -> tuple[Rule, ...]:
    """Embedding, last norm and, unless it is tied to the embedding, the output layer."""
    rules: tuple[Rule, ...] = (
        Rename("embedding.word_embeddings.weight", "model.embed_tokens.weight", tp_dim=0),
        Rename("decoder.final_layernorm.weight", "model.norm.weight"),
    )
    return rules if architecture.tied_embeddings else (*rules, Rename("output_layer.weight", "lm_head.weight", tp_dim=0))


def attention(architecture: Architecture) -> tuple[Rule, ...]:
    """A layer's attention with its norm, under megatron-core's name for a norm that is fused with linear_qkv."""
    ours, theirs = f"{_MEGATRON}self_attention.", f"{_HF}self_attn."
    rules: tuple[Rule, ...] = (
        Rename(f"{ours}linear_qkv.layer_norm_weight", f"{_HF}input_layernorm.weight"),
        QKV(f"{ours}linear_qkv.weight", *_projections("weight")),
        Rename(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight", tp_dim=1),
    )
    if architecture.qkv_bias:
        rules += (QKV(f"{ours}linear_qkv.bias", *_projections("bias")),)
    if architecture.qk_norm:
        rules += tuple(Rename(f"{ours}{name}_layernorm.weight", f"{theirs}{name}_norm.weight") for name in "qk")
    return rules


def _projections(kind: str) -> tuple[str, str, str]:
    attention = f"{_HF}self_attn."
    return f"{attention}q_proj.{kind}", f"{attention}k_proj.{kind}", f"{attention}v_proj.{kind}"


def mlp() -> tuple[Rule, ...]:
    """A layer's MLP with its norm, under megatron-core's name for a norm that is fused with linear_fc1."""
    ours, theirs = f"{_MEGATRON}mlp.", f"{_HF}mlp."
    return (
        Rename(f"{ours}linear_fc1.layer_norm_weight", f"{_HF}post_attention_layernorm.weight"),
        GateUp(f"{ours}linear_fc1.weight", f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"),
        Rename(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight", tp_dim=1),
    )


def experts(block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """A layer's mixture of experts with its norm. Hugging Face's names: of the module (`block`), of an expert's matrices."""
    ours, theirs = f"{_MEGATRON}mlp.", f"{_HF}{block}."
    expert, hf_expert = f"{ours}experts.experts.{{expert}}.", f"{theirs}experts.{{expert}}."
    return (
        Rename(f"{_MEGATRON}pre_mlp_layernorm.weight", f"{_HF}post_attention_layernorm.weight"),
        Rename(f"{ours}router.weight", f"{theirs}gate.weight"),
        GateUp(f"{expert}linear_fc1.weight", f"{hf_expert}{gate}.weight", f"{hf_expert}{up}.weight"),
        Rename(f"{expert}linear_fc2.weight", f"{hf_expert}{down}.weight", tp_dim=1),
    )
