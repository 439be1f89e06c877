"""Master weights of an optimizer that keeps their lower halves alone."""

import torch

from megatron.sft.checkpoint.optimizer_state import master_weights, split_master_weights


def test_a_master_weight_is_the_same_after_it_was_split() -> None:
    torch.manual_seed(0)
    halfway = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000], dtype=torch.int32).view(torch.float32)
    master = torch.cat([torch.randn(100_000) * 10.0 ** torch.randint(-30, 30, (100_000,)), torch.zeros(1), halfway])
    weights, lower = split_master_weights(master)
    assert (weights.dtype, lower.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(master_weights(weights, {"master_param": lower}).view(torch.int32), master.view(torch.int32))
    # The weights are the nearest ones; between two, that away from zero, as in Transformer Engine's kernel.
    nearest = (master.bfloat16().double() - master.double()).abs()
    assert torch.equal((weights.double() - master.double()).abs(), nearest)
    assert torch.equal(weights[-3:].abs(), (halfway.abs() * (1 + 2**-9)).bfloat16())


def test_master_weights_come_from_where_the_optimizer_has_them() -> None:
    weights, whole = torch.randn(5).bfloat16(), torch.randn(5)
    assert torch.equal(master_weights(weights, {}), weights.float())
    assert master_weights(weights, {"master_param": whole}) is whole
