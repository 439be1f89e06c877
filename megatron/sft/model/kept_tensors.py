"""Bytes a token that attention, latent attention and gated delta nets keep for their backward pass, by name.

unit: bytes of an element; linear: of an input of a linear layer, 1 where it is kept in 8 bits; output: of the input of
attention's output projection.
"""

from megatron.sft.families.architecture import ATTENTION, GATED_DELTA_NET, LATENT_ATTENTION, Architecture
from megatron.sft.model.layout import Layout


def _attention_tensors(architecture: Architecture, layout: Layout, unit: int, linear: int, output: int) -> dict[str, float]:
    tensor_parallel = layout.tensor_parallel
    query = architecture.num_heads * architecture.head_dim / tensor_parallel
    key_value = architecture.num_kv_heads * architecture.head_dim / tensor_parallel
    tensors = {
        "query": unit * query,
        "key and value": 2 * unit * key_value,
        "attention result": unit * query + 4 * architecture.num_heads / tensor_parallel,
        "attention result in 8 bits": output * query if output != unit else 0,
    }
    if architecture.attention_gate:
        tensors |= {"gate": unit * query, "gated result": output * query}
    return tensors


def _latent_attention_tensors(
    architecture: Architecture, layout: Layout, unit: int, linear: int, output: int
) -> dict[str, float]:
    """The norms keep the two vectors, the projections up the normed ones. In 16 bits values are as wide as keys."""
    sizes = architecture.latent
    assert sizes is not None
    parts = layout.tensor_parallel if layout.sequence_parallel else 1
    vectors, normed = (((sizes.query_rank or 0) + sizes.kv_rank * n) / parts for n in (1, layout.context_parallel))
    heads = architecture.num_heads / layout.tensor_parallel
    value = sizes.value_dim if unit == 4 else sizes.head_dim
    # Made again from the vectors with `selective` (see LatentAttention).
    again = "again " if linear == unit else ""
    return {
        "vectors": unit * vectors + 8,
        "normed vectors": linear * normed,
        f"{again if sizes.query_rank else ''}query": unit * heads * sizes.head_dim,
        # Each context-parallel rank makes those of all.
        f"{again}key and value": unit * heads * (sizes.head_dim + value) * layout.context_parallel,
        "attention result": unit * heads * value + 4 * heads,
        # Without the padding, or in 8 bits.
        "narrow result": output * heads * sizes.value_dim if value > sizes.value_dim or output != unit else 0,
    }


def _delta_net_tensors(architecture: Architecture, layout: Layout, unit: int, linear: int, output: int) -> dict[str, float]:
    """The convolution keeps its input, the delta rule query, key, value and step sizes, the gated norm its input and gate."""
    sizes, tensor_parallel = architecture.delta_net, layout.tensor_parallel
    assert sizes is not None
    values = sizes.num_value_heads * sizes.value_dim / tensor_parallel
    convolved = sizes.convolved_rows / tensor_parallel
    # The delta rule keeps normed queries and keys, and a 64 x 64 matrix of each value head and chunk of 64 tokens.
    queries_keys = 2 * sizes.num_key_heads * sizes.key_dim / tensor_parallel
    return {
        "projected": unit * sizes.input_rows / tensor_parallel,
        "convolved": unit * convolved,
        "normed queries and keys": unit * queries_keys,
        "chunks": unit * 64 * sizes.num_value_heads / tensor_parallel,
        "step sizes": 12.0 * sizes.num_value_heads / tensor_parallel,
        "delta result": unit * values,
        "gated result": linear * values,
    }


MIXERS = {ATTENTION: _attention_tensors, GATED_DELTA_NET: _delta_net_tensors, LATENT_ATTENTION: _latent_attention_tensors}
