"""The first values of adapters: those of PEFT's initialization, the same at every layout."""

import pytest
import torch

from megatron.sft.training.adapter_start import drawn_factor

A, B = (
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight",
)


def test_a_factor_is_that_of_its_name_and_the_seed() -> None:
    shape = (64, 1000)
    drawn = drawn_factor(A, shape, 7)
    assert torch.equal(drawn, drawn_factor(A, shape, 7)) and drawn.dtype == torch.float32
    assert not torch.equal(drawn, drawn_factor(A, shape, 8))
    assert not torch.equal(drawn, drawn_factor(A.replace(".0.", ".1."), shape, 7))


def test_its_values_are_spread_as_pefts() -> None:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    ours = drawn_factor(A, (64, 1000), 7)
    layer = Linear(torch.nn.Linear(1000, 8), "default", LoraConfig(r=64), r=64, lora_alpha=64)
    theirs = layer.lora_A["default"].weight.detach()
    assert ours.shape == theirs.shape
    assert float(ours.abs().max()) == pytest.approx(float(theirs.abs().max()), rel=1e-3)
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=2e-2) and abs(float(ours.mean())) < 1e-3
    assert not drawn_factor(B, (8, 64), 7).any() and not layer.lora_B["default"].weight.any()
