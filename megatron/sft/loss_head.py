"""The output layer and its cross entropy for the trained tokens only, in chunks, over a vocabulary split between TP ranks.

No [tokens, vocabulary] matrix ever exists: each chunk's gradient is formed while its logits are at hand, in the forward pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Targets:
    """What a micro-batch is trained on. n is the number of trained tokens.

    positions: [n] int64, where in the micro-batch the hidden state is that predicts the token.
    ids: [n] int64, the tokens to predict.
    weights: [n] float32, each token's weight in the loss; 1 for an average over tokens.
    """

    positions: Tensor
    ids: Tensor
    weights: Tensor


def weighted_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Targets, vocab_size: int, group: ProcessGroup
) -> Tensor:
    """Sum over the trained tokens of weight * -log p(token), float32 scalar, equal on every rank of `group`.

    hidden: [n, hidden size], the same on every rank of `group`, already taken at `targets.positions`; its gradient is this
    rank's part only, to be summed over `group` by the caller. weight: [padded vocabulary / ranks, hidden size], this rank's
    rows of the output matrix. Rows from `vocab_size` on are padding and take no probability.
    """
    total: Tensor = _WeightedCrossEntropy.apply(hidden, weight, targets.ids, targets.weights, vocab_size, group)
    return total


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, weights: Tensor, vocab_size: int, group: ProcessGroup
    ) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_gradient else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_gradient else None
        first_row = group.rank() * weight.shape[0]
        padding = max(0, min(weight.shape[0], first_row + weight.shape[0] - vocab_size))
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits = (hidden[part] @ weight.t()).float()  # [chunk, vocabulary / ranks]
            if padding:
                logits[:, -padding:] = float("-inf")
            losses, gradient = _softmax_cross_entropy(logits, ids[part] - first_row, group, needs_gradient)
            total += losses @ weights[part]
            if gradient is not None and grad_hidden is not None and grad_weight is not None:
                gradient = gradient.mul_(weights[part, None]).to(hidden.dtype)
                torch.matmul(gradient, weight, out=grad_hidden[part])
                grad_weight.add_(gradient.t() @ hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0]
        grad_hidden = grad_hidden * scale.to(grad_hidden.dtype)
        grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _softmax_cross_entropy(
    logits: Tensor, local_ids: Tensor, group: ProcessGroup, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses [chunk] and d(sum of losses)/d(logits) [chunk, vocabulary / ranks] of float32 logits, which are overwritten.

    local_ids: [chunk], the target's column on this rank; outside 0..columns-1 if another rank holds it.
    """
    highest = logits.max(dim=-1).values
    if group.size() > 1:
        torch.distributed.all_reduce(highest, op=ReduceOp.MAX, group=group)
    logits -= highest[:, None]
    here = (local_ids >= 0) & (local_ids < logits.shape[1])
    column = local_ids.clamp(0, logits.shape[1] - 1)[:, None]
    wanted = logits.gather(1, column)[:, 0].masked_fill(~here, 0.0)
    exponentials = logits.exp_()
    sums = torch.stack([exponentials.sum(dim=-1), wanted])  # [2, chunk]
    if group.size() > 1:
        torch.distributed.all_reduce(sums, group=group)
    losses = sums[0].log() - sums[1]
    if not needs_gradient:
        return losses, None
    gradient = exponentials.div_(sums[0][:, None])
    gradient.scatter_add_(1, column, -here.to(gradient.dtype)[:, None])
    return losses, gradient
