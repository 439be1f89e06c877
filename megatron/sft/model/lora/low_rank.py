"""The two products of an adapter, around the frozen linear layer that it belongs to, without copies of large tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dropout:
    """Masks of an adapter's input, a mask for each projection; drawn again from their seeds in the backward pass."""

    probability: float
    seeds: tuple[int, ...]

    def mask(self, place: int, inputs: Tensor) -> Tensor:
        """0 or 1 for each of `inputs`, in their shape and dtype."""
        generator = torch.Generator(inputs.device).manual_seed(self.seeds[place])
        return torch.empty_like(inputs).bernoulli_(1.0 - self.probability, generator=generator)

    @property
    def scale(self) -> float:
        """Of what is kept. It is applied to products: in 16 bits 1 / 0.9 in a mask would be 0.2 % too small everywhere."""
        return 1.0 / (1.0 - self.probability)


def project(inputs: Tensor, factors: Tensor, dropout: Dropout | None) -> tuple[Tensor, Tensor]:
    """(the inputs for the linear layer, their low-rank projection [..., projections * rank]).

    inputs [..., width]; factors [projections * rank, width], the A's of the projections one after another. The first result is
    the inputs' own memory: with it the gradient of both paths is summed inside this one's product.
    """
    result: tuple[Tensor, Tensor] = _Project.apply(inputs, factors, dropout)
    return result


def add_product(outputs: Tensor, low: Tensor, factors: Tensor) -> Tensor:
    """outputs + low @ factors^T in the memory of `outputs`, which nothing else may need: a linear layer's own result.

    outputs [..., width], low [..., n], factors [width, n].
    """
    result: Tensor = _AddProduct.apply(outputs, low, factors)
    return result


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, factors: Tensor, dropout: Dropout | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(inputs, factors)
        ctx.dropout = dropout
        ctx.set_materialize_grads(False)
        if dropout is None:
            low = inputs @ factors.t()
        else:
            blocks = factors.chunk(len(dropout.seeds))
            low = torch.cat([(inputs * dropout.mask(i, inputs)) @ block.t() for i, block in enumerate(blocks)], dim=-1)
            low *= dropout.scale
        passed = inputs.detach()
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(passed)  # or the linear layer would make a gradient that no one needs
        return passed, low

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_inputs, grad_low = gradients
        inputs, factors = ctx.saved_tensors
        if grad_low is None:
            return grad_inputs, None, None
        flat, flat_low = inputs.flatten(0, -2), grad_low.flatten(0, -2)
        wanted = ctx.needs_input_grad[0]
        if ctx.dropout is None:
            if wanted:
                grad_inputs = _added(grad_inputs, flat_low, factors, inputs)
            return grad_inputs, flat_low.t() @ flat, None
        parts, flat_low = [], flat_low * ctx.dropout.scale
        blocks = factors.chunk(len(ctx.dropout.seeds))
        for place, (low, block) in enumerate(zip(flat_low.chunk(len(blocks), dim=-1), blocks, strict=True)):
            mask = ctx.dropout.mask(place, inputs)
            parts.append(low.t() @ (inputs * mask).flatten(0, -2))
            if wanted:
                through = (low @ block).view_as(inputs) * mask
                grad_inputs = through if grad_inputs is None else grad_inputs + through
        return grad_inputs, torch.cat(parts), None


def _added(total: Tensor | None, low: Tensor, factors: Tensor, like: Tensor) -> Tensor:
    """total + low @ factors, in total's memory: the linear layer has made it for this sum alone."""
    if total is None:
        return (low @ factors).view_as(like)
    if not total.is_contiguous():
        return total + (low @ factors).view_as(like)
    total.view(-1, factors.shape[1]).addmm_(low, factors)
    return total


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, low: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(low, factors)
        # Autograd must not see the change: the linear layer's backward pass does not need its result.
        result = outputs.data
        result.view(-1, factors.shape[0]).addmm_(low.flatten(0, -2), factors.t())
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        low, factors = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        return gradient, (flat @ factors).view_as(low), flat.t() @ low.flatten(0, -2)
