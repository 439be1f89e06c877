"""Floating-point operations that training on packed rows needs, for TFLOP/s and MFU in the log.

Counted as the field does: two operations a multiply-add, three times the forward pass for forward and backward, nothing for
recomputation, norms and activations. Attention counts what a causal mask over each conversation's real length lets through.
"""

from megatron.sft.families.architecture import Shape


def training_flops(shape: Shape, tokens: int, trained_tokens: int, sum_squared_lengths: int) -> float:
    """Operations of one forward and backward pass of the whole model over these tokens.

    tokens: all tokens without padding. trained_tokens: those that the output head computes logits for.
    sum_squared_lengths: the sum over conversations of their length squared.
    """
    projections = shape.hidden_size * shape.head_dim * 2 * (shape.num_heads + shape.num_kv_heads)
    mlp = 3 * shape.hidden_size * shape.ffn_hidden_size
    if shape.mixture:
        mixture = shape.mixture
        expert = 3 * shape.hidden_size * mixture.ffn_hidden_size
        mlp = mixture.experts_per_token * expert + mixture.num_experts * shape.hidden_size
    linear = 6.0 * shape.num_layers * (projections + mlp) * tokens
    head = 6.0 * shape.hidden_size * shape.vocab_size * trained_tokens
    seen = sum_squared_lengths
    if shape.sliding_window:
        # A window of w lets at most w tokens be seen: L^2 / 2 becomes w * (L - w / 2) at most.
        seen = min(seen, 2 * shape.sliding_window * tokens)
    # Scores and their use: 4 * heads * head_dim for each of L^2 / 2 pairs, three times.
    attention = 6.0 * shape.num_layers * shape.num_heads * shape.head_dim * seen
    return linear + head + attention
