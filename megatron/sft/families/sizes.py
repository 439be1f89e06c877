"""Shapes of a model's weights as Megatron stores them, unsplit, from the architecture alone."""

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.rules import Rule


def weight_shape(architecture: Architecture, rule: Rule) -> tuple[int, ...]:
    """The whole parameter's shape: (outputs, inputs) of a matrix, (size,) of a vector."""
    hidden, head_dim = architecture.hidden_size, architecture.head_dim
    query = architecture.num_heads * head_dim
    fused = query + 2 * architecture.num_kv_heads * head_dim
    module, kind = rule.megatron.split(".")[-2:]
    width = architecture.ffn_hidden_size
    if architecture.moe and "{expert}" in rule.megatron:
        width = architecture.moe.ffn_hidden_size
    matrices = {
        "word_embeddings": (architecture.vocab_size, hidden),
        "output_layer": (architecture.vocab_size, hidden),
        "linear_qkv": (fused, hidden),
        "linear_proj": (hidden, query),
        "linear_fc1": (2 * width, hidden),
        "linear_fc2": (hidden, width),
        "router": (architecture.moe.num_experts if architecture.moe else 0, hidden),
    }
    if kind == "weight" and module in matrices:
        return matrices[module]
    if kind == "bias":
        return (matrices[module][0],)
    return (head_dim,) if module in ("q_layernorm", "k_layernorm") else (hidden,)
