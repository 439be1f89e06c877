"""The products of an adapter against autograd, with and without dropout, whose masks are drawn again in the backward pass."""

import pytest
import torch
from torch import Tensor

from megatron.sft.model.lora.low_rank import Dropout, add_product, project

TOKENS, WIDTH, RANK, OUTPUTS = 37, 24, 3, 20
SEEDS = (1 << 40, 7)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.requires_grad_() for tensor in made]


def kept(seed: int, probability: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(TOKENS, 1, WIDTH, dtype=torch.float64).bernoulli_(1 - probability, generator=generator)


@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("inputs_need_gradient", [True, False])
def test_two_projections_of_one_input_and_the_layer_between_have_the_gradients_of_their_formula(
    probability: float, inputs_need_gradient: bool
) -> None:
    x, a, b, weight = tensors((TOKENS, 1, WIDTH), (2 * RANK, WIDTH), (OUTPUTS, 2 * RANK), (OUTPUTS, WIDTH))
    x.requires_grad_(inputs_need_gradient)
    weight.requires_grad_(False)
    passed, low = project(x, a, Dropout(probability, SEEDS) if probability else None)
    assert passed.data_ptr() == x.data_ptr() and passed.requires_grad == inputs_need_gradient
    ours = add_product(passed @ weight.t(), low, b)
    masks = [kept(seed, probability) / (1 - probability) for seed in SEEDS]
    assert not probability or not torch.equal(masks[0], masks[1])
    halves = [(x * mask) @ part.t() for mask, part in zip(masks, a.chunk(2), strict=True)]
    expected = x @ weight.t() + torch.cat(halves, dim=-1) @ b.t()
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    wanted = [x, a, b] if inputs_need_gradient else [a, b]
    upstream = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for gradient, reference in zip(
        torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


def test_what_is_not_used_further_gets_no_gradient_and_zero_tokens_work() -> None:
    x, a, b = tensors((0, WIDTH), (RANK, WIDTH), (OUTPUTS, RANK))
    passed, low = project(x, a, Dropout(0.5, (3,)))
    add_product(passed @ torch.ones(WIDTH, OUTPUTS, dtype=torch.float64), low, b).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, WIDTH) and a.grad is not None and not a.grad.any()
    x, a = tensors((5, WIDTH), (RANK, WIDTH))
    passed, _ = project(x, a, None)
    passed.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and a.grad is None


def test_dropout_in_16_bits_keeps_the_mean() -> None:
    """1 / 0.9 rounded to bfloat16 is 0.17 % too small."""
    x = torch.ones(4096, 256, dtype=torch.bfloat16)
    _, low = project(x, torch.full((1, 256), 1 / 256, dtype=torch.bfloat16), Dropout(0.1, (5,)))
    assert abs(float(low.float().mean()) - 1.0) < 1e-3
