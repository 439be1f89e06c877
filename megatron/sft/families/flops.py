"""Floating-point operations of training on packed rows, for TFLOP/s and MFU in the log.

Counted as usual in the field: two operations per multiply-add, three times the forward pass for forward and backward, nothing
for recomputation, norms and activations. Attention counts the pairs that a causal mask over each conversation lets through.
"""

from megatron.sft.families.architecture import Architecture


def training_flops(
    architecture: Architecture, tokens: int, trained_tokens: int, sum_squared_lengths: int, frozen: bool = False
) -> float:
    """Operations of one forward and backward pass of the whole model over these tokens.

    frozen: the weights are, so that they get no gradients: two times the forward pass. Adapters' own operations, below 1 % of
    the model's at usual ranks, are not counted.

    tokens: all tokens without padding. trained_tokens: those that the output head computes logits for.
    sum_squared_lengths: the sum over conversations of their length squared.
    """
    projections = architecture.hidden_size * architecture.head_dim * 2 * (architecture.num_heads + architecture.num_kv_heads)
    mlp = 3 * architecture.hidden_size * architecture.ffn_hidden_size
    if architecture.moe:
        moe = architecture.moe
        expert = 3 * architecture.hidden_size * moe.ffn_hidden_size
        mlp = moe.experts_per_token * expert + moe.num_experts * architecture.hidden_size
    of_weight = 4.0 if frozen else 6.0
    linear = of_weight * architecture.num_layers * (projections + mlp) * tokens
    head = of_weight * architecture.hidden_size * architecture.vocab_size * trained_tokens
    seen = sum_squared_lengths
    if architecture.sliding_window:
        # A window of w lets at most w tokens be seen: L^2 / 2 becomes w * (L - w / 2) at most.
        seen = min(seen, 2 * architecture.sliding_window * tokens)
    # Scores and their use: 4 * heads * head_dim for each of L^2 / 2 pairs, three times.
    attention = 6.0 * architecture.num_layers * architecture.num_heads * architecture.head_dim * seen
    return linear + head + attention


def head_forward_flops(architecture: Architecture, trained_tokens: int) -> float:
    """Operations of the output head alone, forward, over these tokens: what a loss of pairs adds to a step."""
    return 2.0 * architecture.hidden_size * architecture.vocab_size * trained_tokens
