"""The output layer and its cross entropy for the trained tokens only, in chunks, over a vocabulary split between TP ranks.

No [tokens, vocabulary] matrix ever exists: each chunk's gradient is formed while its logits are at hand, in the forward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from megatron.sft.model.fused_wgrad import add_product, added_gradient
from megatron.sft.model.layout import HEAD_CHUNK_TOKENS


@dataclass(frozen=True)
class Targets:
    """What a micro-batch is trained on. n is the number of trained tokens.

    hidden_indices: [n] int64, index in the micro-batch of the hidden state that predicts each token.
    ids: [n] int64, the tokens to predict.
    weights: [n] float32, each token's weight in the loss; 1 for an average over tokens, negative where a token is to become
    less probable.
    factor: of some tokens' -log p, [m], what their weights are multiplied by, [m], without gradient; None is 1.
    """

    hidden_indices: Tensor
    ids: Tensor
    weights: Tensor
    factor: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class LogitShape:
    """What becomes of a logit: times `scale`, then cap * tanh(logit / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def of(self, logits: Tensor) -> Tensor:
        """The shaped logits."""
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def slope(self, shaped: Tensor) -> Tensor | float:
        """The derivative of `of`, from its result."""
        return self.scale if self.cap is None else self.scale * (1 - (shaped / self.cap).square())


PLAIN = LogitShape()


def weighted_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Targets,
    vocab_size: int,
    group: ProcessGroup,
    weight_is_shared: bool = False,
    upstream_grad: Tensor | None = None,
    shape: LogitShape = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Sum over the trained tokens of weight * -log p(token), float32 scalar, and -log p of each, [n] float32 without gradient.

    Both are equal on every rank of `group`.

    hidden: [n, hidden size], the same on every rank of `group`, selected by `targets.hidden_indices`; its gradient is this
    rank's part only, to be summed over `group` by the caller.
    weight: [padded vocabulary / ranks, hidden size], this rank's rows of the output matrix. Rows from `vocab_size` on are
    padding and take no probability.

    The gradient of a weight that has megatron-core's `main_grad` is added there in the forward pass, which assumes that the
    backward pass starts from this sum with the gradient `upstream_grad` (float32 scalar; None is 1).
    A weight that requires no gradient gets none.
    weight_is_shared: the weight gets another gradient from the embedding, which completes it.
    """
    result: tuple[Tensor, Tensor] = _WeightedCrossEntropy.apply(
        hidden, weight, targets, vocab_size, group, weight_is_shared, upstream_grad, torch.is_grad_enabled(), shape
    )
    return result


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Targets,
        vocab_size: int,
        group: ProcessGroup,
        weight_is_shared: bool,
        upstream_grad: Tensor | None,
        needs_gradient: bool,
        shape: LogitShape,
    ) -> tuple[Tensor, Tensor]:
        token_losses = torch.empty(len(targets.ids), dtype=torch.float32, device=hidden.device)
        weights = targets.weights if targets.factor is None else targets.weights.clone()
        grad_hidden = torch.empty_like(hidden) if needs_gradient else None
        main_grad = getattr(weight, "main_grad", None)
        grad_weight = None
        if needs_gradient and weight.requires_grad:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if main_grad is None else main_grad
        first_row = group.rank() * weight.shape[0]
        num_rows = max(0, min(weight.shape[0], vocab_size - first_row))
        for start in range(0, hidden.shape[0], HEAD_CHUNK_TOKENS):
            part = slice(start, start + HEAD_CHUNK_TOKENS)
            logits = hidden[part] @ weight.t()  # [chunk, vocabulary / ranks]
            local_ids = targets.ids[part] - first_row
            statistics = _statistics(logits, local_ids, num_rows, shape)
            log_sums, token_losses[part] = _combine(statistics, group)
            if targets.factor is not None:
                weights[part] *= targets.factor(token_losses[part])
            if grad_hidden is not None:
                scaled = weights[part] if upstream_grad is None else weights[part] * upstream_grad
                gradient = _gradient(logits, local_ids, log_sums, scaled, num_rows, shape)
                torch.matmul(gradient, weight, out=grad_hidden[part])
                if grad_weight is not None:
                    add_product(grad_weight, gradient, hidden[part])
                del gradient
            del logits  # before the next chunk's are made
        ctx.save_for_backward(grad_hidden, grad_weight if main_grad is None else None)
        ctx.weight, ctx.weight_is_shared, ctx.upstream_grad = weight, weight_is_shared, upstream_grad
        ctx.mark_non_differentiable(token_losses)
        return token_losses @ weights, token_losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0] if ctx.upstream_grad is None else grad_outputs[0] / ctx.upstream_grad
        grad_hidden = grad_hidden * scale.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight.dtype)
        elif ctx.weight.requires_grad and not ctx.weight_is_shared:
            grad_weight = added_gradient(ctx.weight)
        return grad_hidden, grad_weight, None, None, None, None, None, None, None


def _statistics(logits: Tensor, local_ids: Tensor, num_rows: int, shape: LogitShape) -> Tensor:
    """[chunk, 3] float32: largest logit, sum of exponentials relative to it, the target's logit (-inf if elsewhere).

    Columns from num_rows on are padding; a rank may hold nothing else.
    """
    if logits.is_cuda:
        from megatron.sft.kernels.cross_entropy import row_statistics

        return row_statistics(logits, local_ids, num_rows, shape.scale, shape.cap)
    if num_rows == 0:
        return torch.tensor([[float("-inf"), 0.0, float("-inf")]]).expand(len(logits), 3).clone()
    real = shape.of(logits[:, :num_rows].float())
    largest = real.max(dim=-1).values
    here = (local_ids >= 0) & (local_ids < num_rows)
    wanted = real.gather(1, local_ids.clamp(0, num_rows - 1)[:, None])[:, 0].masked_fill(~here, float("-inf"))
    return torch.stack([largest, (real - largest[:, None]).exp().sum(dim=-1), wanted], dim=1)


def _combine(statistics: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """log(sum of exponentials) and losses, both [chunk], over the whole vocabulary."""
    largest, sums, wanted = statistics.unbind(dim=1)
    if group.size() > 1:
        highest = torch.stack([largest, wanted])
        torch.distributed.all_reduce(highest, op=ReduceOp.MAX, group=group)
        sums = sums * (largest - highest[0]).exp()
        torch.distributed.all_reduce(sums, group=group)
        largest, wanted = highest.unbind()
    log_sums = largest + sums.log()
    return log_sums, log_sums - wanted


def _gradient(logits: Tensor, local_ids: Tensor, log_sums: Tensor, weights: Tensor, num_rows: int, shape: LogitShape) -> Tensor:
    """d(sum of weights * losses)/d(logits), [chunk, vocabulary / ranks] in the logits' dtype; may overwrite them."""
    if logits.is_cuda:
        from megatron.sft.kernels.cross_entropy import gradient_in_place

        gradient_in_place(logits, local_ids, log_sums, weights, num_rows, shape.scale, shape.cap)
        return logits
    shaped = shape.of(logits.float())
    gradient = (shaped - log_sums[:, None]).exp_()
    gradient[:, num_rows:] = 0.0
    here = (local_ids >= 0) & (local_ids < num_rows)
    column = local_ids.clamp(0, logits.shape[1] - 1)[:, None]
    gradient.scatter_add_(1, column, -here.to(gradient.dtype)[:, None])
    return gradient.mul_(weights[:, None]).mul_(shape.slope(shaped)).to(logits.dtype)
