"""The two products of an adapter, around the frozen linear layer that it belongs to, without copies of large tensors."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.sft.model.experts.grouped_linear import grouped_product

# torch's grouped product takes rows whose length in 16 bits is a multiple of 16 bytes.
_ALIGNED = 8


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


def project_grouped(inputs: Tensor, factors: Tensor, ends: Tensor, dropout: Dropout | None) -> Tensor:
    """[n, projections * rank]: each row's projection by its expert's A's, factors [experts, projections * rank, width].

    inputs [n, width], sorted by expert; ends: int32 [experts], the rows up to and with each expert's.
    """
    if dropout is None:
        return _aligned_product(inputs, factors, ends)
    blocks = factors.chunk(len(dropout.seeds), dim=1)
    parts = [_aligned_product(inputs * dropout.mask(place, inputs), block, ends) for place, block in enumerate(blocks)]
    return torch.cat(parts, dim=1) * dropout.scale


def add_grouped(outputs: Tensor, low: Tensor, factors: Tensor, ends: Tensor) -> Tensor:
    """As `add_product`, each row with its expert's factors: outputs [n, width], low [n, m], factors [experts, width, m]."""
    missing = -low.shape[1] % _ALIGNED
    if missing:
        low, factors = F.pad(low, (0, missing)), F.pad(factors, (0, missing))
    result: Tensor = _AddInPlace.apply(outputs, grouped_product(low, factors, ends))
    return result


def _aligned_product(rows: Tensor, factors: Tensor, ends: Tensor) -> Tensor:
    outputs = factors.shape[1]
    return grouped_product(rows, F.pad(factors, (0, 0, 0, -outputs % _ALIGNED)), ends)[:, :outputs]


class _AddInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, added: Tensor) -> Tensor:
        # Autograd must not see the change: the linear layer's backward pass does not need its result.
        return outputs.data.add_(added)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], gradients[0]


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
