"""Floating-point operations of training on packed rows, for TFLOP/s and MFU in the log.

Counted as usual in the field: two operations per multiply-add, three times the forward pass for forward and backward, nothing
for recomputation, norms and activations. Attention counts the pairs that a causal mask over each conversation lets through.
"""

from collections import Counter

from megatron.sft.families.architecture import GATED_DELTA_NET, LATENT_ATTENTION, Architecture, Layer


def training_flops(
    architecture: Architecture, tokens: int, trained_tokens: int, sum_squared_lengths: int, frozen: bool = False
) -> float:
    """Operations of one forward and backward pass of the whole model over these tokens.

    frozen: the weights are, so that they get no gradients: two times the forward pass. Adapters' own operations, below 1 % of
    the model's at usual ranks, are not counted.

    tokens: all tokens without padding. trained_tokens: those that the output head computes logits for.
    sum_squared_lengths: the sum over conversations of their length squared.
    """
    weights, states, attention = 0.0, 0.0, 0.0
    for layer, count in Counter(architecture.layers).items():
        weights += count * _matrix_elements(architecture, layer)
        if layer.mixer == GATED_DELTA_NET:
            states += count * _state_elements(architecture)
            continue
        seen: float = sum_squared_lengths
        if layer.window:
            # A window of w lets at most w tokens be seen: L^2 / 2 becomes w * (L - w / 2) at most.
            seen = min(seen, 2 * layer.window * tokens)
        # Scores and their use: 2 * heads * (size of a key + of a value) for each of L^2 / 2 pairs, three times.
        value_dim = architecture.latent.value_dim if architecture.latent else architecture.head_dim
        attention += 3.0 * count * architecture.num_heads * (architecture.head_dim + value_dim) * seen
    of_weight = 4.0 if frozen else 6.0
    head = of_weight * architecture.hidden_size * architecture.vocab_size * trained_tokens
    return of_weight * weights * tokens + 6.0 * states * tokens + head + attention


def _matrix_elements(architecture: Architecture, layer: Layer) -> int:
    """Elements of the matrices of one layer that a token is multiplied with."""
    hidden = architecture.hidden_size
    if layer.mixer == GATED_DELTA_NET:
        sizes = architecture.delta_net
        assert sizes is not None
        mixer = hidden * (sizes.input_rows + sizes.num_value_heads * sizes.value_dim)
    elif layer.mixer == LATENT_ATTENTION:
        latent, heads = architecture.latent, architecture.num_heads
        assert latent is not None
        mixer = hidden * latent.down_rows + (latent.query_rank or hidden) * heads * latent.head_dim
        mixer += heads * (latent.kv_rank * (latent.nope_dim + latent.value_dim) + latent.value_dim * hidden)
    else:
        queries = architecture.num_heads * (2 if architecture.attention_gate else 1)
        mixer = hidden * architecture.head_dim * (queries + architecture.num_heads + 2 * architecture.num_kv_heads)
    if layer.experts:
        moe = architecture.moe
        assert moe is not None
        width = moe.experts_per_token * moe.ffn_hidden_size + moe.shared_width
        return mixer + 3 * hidden * width + (moe.num_experts + moe.shared_gate) * hidden
    return mixer + 3 * hidden * architecture.ffn_hidden_size


def _state_elements(architecture: Architecture) -> int:
    """Multiply-adds of a token with the state of a gated delta net, and in its convolution.

    Each value head reads its state for the key and for the query, lets it decay and adds to it, as megatron-core counts.
    """
    sizes = architecture.delta_net
    assert sizes is not None
    return 4 * sizes.num_value_heads * sizes.key_dim * sizes.value_dim + sizes.kernel * sizes.convolved_rows


def head_forward_flops(architecture: Architecture, trained_tokens: int) -> float:
    """Operations of the output head alone, forward, over these tokens: what a loss of pairs adds to a step."""
    return 2.0 * architecture.hidden_size * architecture.vocab_size * trained_tokens
