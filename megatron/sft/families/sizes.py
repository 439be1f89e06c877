"""Shapes of a model's weights as Megatron stores them, unsplit, from the architecture alone."""

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.rules import Rule


def weight_shape(architecture: Architecture, rule: Rule) -> tuple[int, ...]:
    """The whole parameter's shape: (outputs, inputs) of a matrix, (size,) of a vector."""
    hidden, head_dim = architecture.hidden_size, architecture.head_dim
    query = architecture.num_heads * head_dim
    fused = query * (2 if architecture.attention_gate else 1) + 2 * architecture.num_kv_heads * head_dim
    module, kind = rule.megatron.split(".")[-2:]
    moe, width = architecture.moe, architecture.ffn_hidden_size
    if moe and "{expert}" in rule.megatron:
        width = moe.ffn_hidden_size
    elif moe and ".shared_experts." in rule.megatron:
        width = moe.shared_width
    matrices = {
        "word_embeddings": (architecture.vocab_size, hidden),
        "output_layer": (architecture.vocab_size, hidden),
        "linear_qkv": (fused, hidden),
        "linear_proj": (hidden, query),
        "linear_fc1": (2 * width, hidden),
        "linear_fc2": (hidden, width),
        "router": (moe.num_experts if moe else 0, hidden),
        **_of_latent_attention(architecture),
    }
    if kind == "gate_weight":
        return (1, hidden)
    if kind == "weight" and module in matrices:
        return matrices[module]
    if kind in ("bias", "expert_bias"):
        return (matrices[module][0],)
    if kind == "softmax_offset":
        return (architecture.num_heads,)
    if module in ("q_layernorm", "k_layernorm"):
        heads = architecture.num_heads if module == "q_layernorm" else architecture.num_kv_heads
        return (head_dim * (heads if architecture.query_key_norm == "projection" else 1),)
    return _of_delta_net(architecture, module, kind) or (hidden,)


def _of_latent_attention(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of multi-head latent attention, {} for a model without it."""
    sizes = architecture.latent
    if sizes is None:
        return {}
    hidden, heads = architecture.hidden_size, architecture.num_heads
    return {
        "linear_down": (sizes.down_rows, hidden),
        "linear_q_up": (heads * sizes.head_dim, sizes.query_rank or hidden),
        "linear_kv_up": (heads * (sizes.nope_dim + sizes.value_dim), sizes.kv_rank),
        "linear_proj": (hidden, heads * sizes.value_dim),
        "q_layernorm": (sizes.query_rank or 0,),
        "kv_layernorm": (sizes.kv_rank,),
    }


def _of_delta_net(architecture: Architecture, module: str, kind: str) -> tuple[int, ...]:
    """The shape of a gated delta net's weight, () for another."""
    sizes = architecture.delta_net
    if sizes is None:
        return ()
    values = sizes.num_value_heads * sizes.value_dim
    if kind in ("A_log", "dt_bias"):
        return (sizes.num_value_heads,)
    shapes: dict[str, tuple[int, ...]] = {
        "in_proj": (sizes.input_rows, architecture.hidden_size),
        "out_proj": (architecture.hidden_size, values),
        "conv1d": (sizes.convolved_rows, 1, sizes.kernel),
        "out_norm": (sizes.value_dim,),
    }
    return shapes.get(module, ()) if kind == "weight" else ()
