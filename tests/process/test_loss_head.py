"""The loss head against plain float64 cross entropy: value and gradients, whole and with the vocabulary over two ranks."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron.sft.model import cross_entropy
from megatron.sft.model.cross_entropy import Targets, weighted_cross_entropy
from tests.support import tiny

# 37 real rows and 3 of padding, split over two ranks as 20 and 20; more tokens than a chunk.
VOCAB_SIZE, PADDED, HIDDEN, NUM_TOKENS = 37, 40, 8, 70


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(NUM_TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    ids = torch.randint(0, VOCAB_SIZE, (NUM_TOKENS,), generator=generator)
    weights = torch.rand(NUM_TOKENS, generator=generator)
    return hidden, weight, ids, weights


def _expected() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight, ids, weights = _inputs()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    losses = F.cross_entropy(hidden @ weight[:VOCAB_SIZE].t(), ids, reduction="none")
    total = 3 * (losses * weights.double()).sum()
    total.backward()
    assert hidden.grad is not None and weight.grad is not None
    return total.detach() / 3, hidden.grad, weight.grad


def _check(rank: int, ranks: int, group: torch.distributed.ProcessGroup) -> None:
    cross_entropy.HEAD_CHUNK_TOKENS = 16
    hidden, weight, ids, weights = _inputs()
    part = slice(rank * PADDED // ranks, (rank + 1) * PADDED // ranks)
    hidden, local = hidden.requires_grad_(), weight[part].clone().requires_grad_()
    loss, token_losses = weighted_cross_entropy(hidden, local, Targets(ids, ids, weights), VOCAB_SIZE, group)
    assert not token_losses.requires_grad
    torch.testing.assert_close(token_losses @ weights, loss.detach())
    (3 * loss).backward()
    assert hidden.grad is not None and local.grad is not None
    torch.distributed.all_reduce(hidden.grad, group=group)
    total, grad_hidden, grad_weight = _expected()
    torch.testing.assert_close(loss.double(), total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), grad_hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(local.grad.double(), grad_weight[part], rtol=1e-4, atol=1e-5)
    no_targets = Targets(ids[:0], ids[:0], weights[:0])
    assert weighted_cross_entropy(hidden[:0], local, no_targets, VOCAB_SIZE, group)[0].item() == 0.0


@pytest.mark.parametrize("ranks", [1, 2])
def test_loss_and_gradients_are_those_of_float64(ranks: int) -> None:
    assert tiny.launch_test_worker(ranks, Path(__file__)).count("agrees") == ranks


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    world = torch.distributed.group.WORLD
    assert world is not None
    _check(world.rank(), world.size(), world)
    sys.stdout.write("agrees\n")
    torch.distributed.destroy_process_group()
