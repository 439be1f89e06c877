"""What lies between the experts' products: kernels give what the CPU's formulas give, and both the definition's gradients."""

import pytest
import torch
import torch.nn.functional as F

from megatron.sft.model.experts import routed_rows as routed
from megatron.sft.model.experts.grouped_linear import grouped_product

TOKENS, CHOSEN, EXPERTS, HIDDEN, WIDTH = 37, 3, 8, 48, 32
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


def mixture(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    bias: torch.Tensor,
    kind: str,
) -> torch.Tensor:
    """The definition, token by token. The clamped activation with its bias is gpt-oss's."""
    results = []
    for token, row in enumerate(hidden):
        parts = []
        for weight, expert in zip(weights[token], chosen[token].tolist(), strict=True):
            gate, value = (up[expert] @ row + (bias[expert] if kind == "clamped_silu" else 0)).chunk(2)
            if kind == "clamped_silu":
                gate, value = gate.clamp(max=7.0), value.clamp(-7.0, 7.0)
                active = gate * torch.sigmoid(1.702 * gate) * (value + 1)
            else:
                active = F.silu(gate) * value
            parts.append(weight * (down[expert] @ active))
        results.append(torch.stack(parts).sum(dim=0))
    return torch.stack(results)


def ours(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    bias: torch.Tensor,
    kind: str,
) -> torch.Tensor:
    rows = routed.routed_rows(chosen, EXPERTS)
    gate_up = grouped_product(routed.gather_rows(hidden, rows), up, rows.ends)
    added = routed.expert_bias(bias, rows.ends, len(gate_up)) if kind == "clamped_silu" else None
    active = routed.weighted_swiglu(gate_up, weights.flatten()[rows.order], kind, added)
    return routed.combine_rows(grouped_product(active, down, rows.ends), rows)


@pytest.mark.parametrize("kind", ["silu", "clamped_silu"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_a_mixture_is_its_definition_with_autograds_gradients(
    device: str, dtype: torch.dtype, tolerance: float, kind: str
) -> None:
    torch.manual_seed(0)
    inputs = [
        torch.randn(TOKENS, HIDDEN),
        torch.rand(TOKENS, CHOSEN),
        torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) * HIDDEN**-0.5,
        torch.randn(EXPERTS, HIDDEN, WIDTH) * WIDTH**-0.5,
        4 * torch.randn(EXPERTS, 2 * WIDTH),  # some beyond the limits of 7
    ]
    # Experts 2 and 7 get no token, expert 0 one of every token.
    others = torch.tensor([1, 3, 4, 5, 6])
    chosen = torch.stack([torch.cat([torch.zeros(1).long(), others[torch.randperm(5)[:2]]]) for _ in range(TOKENS)])
    results = []
    for function, precision, place in ((mixture, torch.float32, "cpu"), (ours, dtype, device)):
        parts = [part.detach().to(dtype).to(place, precision).clone().requires_grad_() for part in inputs]
        parts[1] = inputs[1].detach().to(place).clone().requires_grad_()
        output = function(parts[0], parts[1], chosen.to(place), parts[2], parts[3], parts[4], kind)
        output.backward(torch.sin(torch.arange(output.numel(), device=place)).view_as(output).to(output.dtype))
        results.append([output.detach().cpu().float(), *(part.grad.cpu().float() for part in parts if part.grad is not None)])
    for expected, given in zip(*results, strict=True):
        assert (given - expected).norm() <= tolerance * expected.norm()
    assert len(results[1]) == (6 if kind == "clamped_silu" else 5)
    assert results[1][3][2].abs().sum() == 0 == results[1][4][7].abs().sum()


def test_rows_are_sorted_by_expert_and_know_their_tokens() -> None:
    chosen = torch.tensor([[2, 0], [2, 1], [0, 2]])
    rows = routed.routed_rows(chosen, 4)
    assert rows.tokens.tolist() == [0, 2, 1, 0, 1, 2]
    assert rows.ends.tolist() == [2, 3, 6, 6]
    assert rows.places.tolist() == [[3, 0], [4, 2], [1, 5]]
    assert chosen.flatten()[rows.order].tolist() == [0, 0, 1, 2, 2, 2]
