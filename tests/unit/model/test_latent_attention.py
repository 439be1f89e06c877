"""Latent attention on packed rows against transformers' in float64, with gradients; `-m gpu` runs the same on a GPU."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from megatron.sft.data.tokenized import Row
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.registry import layer_rules, read_architecture
from megatron.sft.families.rope import inverse_frequencies
from megatron.sft.model import process_groups
from megatron.sft.model.config import transformer_config
from megatron.sft.model.inputs import MicroBatch
from megatron.sft.model.layer_specs import stage_layers
from megatron.sft.model.layout import Layout
from megatron.sft.model.rotary import rotary_tables
from megatron.sft.runtime import device
from megatron.sft.training.batches import make_micro_batch

# In 16 bits results are rounded several times on their way, relative to the largest.
TOLERANCES = {"fp32": 1e-4, "bf16": 1e-2}
LENGTHS = (90, 5, 37)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32, "mscale_all_dim": 0.8}
# The sizes of heads as published: DeepSeek-V3's, without a vector for queries as in Moonlight, and GLM-4.7-Flash's.
SIZES: dict[str, dict[str, Any]] = {
    "DeepSeek-V3": {"q_lora_rank": 96, "qk_nope_head_dim": 128, "v_head_dim": 128, "attention_bias": True},
    "Moonlight": {"q_lora_rank": None, "qk_nope_head_dim": 128, "v_head_dim": 128},
    "GLM-4.7-Flash": {"q_lora_rank": 96, "qk_nope_head_dim": 192, "v_head_dim": 256},
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def one_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """megatron-core's groups of one process, on this device."""
    if request.param == "cpu":
        monkeypatch.setenv("MEGATRON_SFT_DEVICE", "cpu")
    elif not torch.cuda.is_available():
        pytest.skip("no GPU")
    with process_groups.parallel(Layout()):
        yield


def transformers_layer(changes: dict[str, Any]) -> Any:
    """A random layer of DeepSeek-V3 in float64, with its `config` and `rotary`."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    config = DeepseekV3Config(
        hidden_size=160, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1, first_k_dense_replace=1,
        intermediate_size=32, vocab_size=64, kv_lora_rank=64, qk_rope_head_dim=64, rope_parameters=YARN, **changes,
    )  # fmt: skip
    config._attn_implementation = "eager"
    layer: Any = theirs.DeepseekV3Attention(config, 0).double()
    torch.manual_seed(0)
    for name, parameter in layer.named_parameters():
        values = torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.1) + float("norm" in name)
        parameter.data = values.bfloat16().double()  # the same in any precision
    layer.config, layer.rotary = config, theirs.DeepseekV3RotaryEmbedding(config)
    return layer


def expected(layer: Any, hidden: Tensor) -> Tensor:
    """Each conversation alone."""
    results = []
    for part in hidden.split(LENGTHS):
        positions = torch.arange(len(part))[None]
        cosines_sines = layer.rotary(part[None], positions)
        mask = torch.full((len(part), len(part)), float("-inf"), dtype=part.dtype).triu(1)
        results.append(layer(part[None], cosines_sines, mask[None, None])[0][0])
    return torch.cat(results)


def our_layer(layer: Any, precision: str) -> tuple[Architecture, Any]:
    """The architecture, and our layer with the same weights."""
    architecture = read_architecture({**layer.config.to_dict(), "dtype": "float32"}, "config.json")
    config = transformer_config(architecture, Layout(), precision)
    specs = stage_layers(architecture, config, None).layer_specs
    assert specs is not None
    ours = build_module(specs[0].submodules.self_attention, config=config, layer_number=1).to(device.current())
    for name, weight in of_ours(architecture, {name: each.data for name, each in layer.named_parameters()}).items():
        parameter = ours.get_parameter(name)
        parameter.data.copy_(weight)
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # without Transformer Engine they go there
    return architecture, ours


def of_ours(architecture: Architecture, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights, or gradients, in our form."""
    found = {}
    for rule in layer_rules(architecture, architecture.layers[0]):
        if ".self_attention." in rule.megatron:
            parts = [theirs[name.partition(".self_attn.")[2]] for name in rule.hf]
            found[rule.megatron.partition(".self_attention.")[2]] = rule.to_megatron(architecture, *parts)
    return found


def run(ours: Any, architecture: Architecture, hidden: Tensor, weights: Tensor, batch: MicroBatch, again: bool) -> list[Tensor]:
    """The output and the gradients: of the hidden states, then of each weight."""
    ours.zero_grad()
    inputs = hidden.detach().clone().requires_grad_()
    rope = architecture.ropes[0]
    tables = rotary_tables(batch.position_ids[0], inverse_frequencies(rope, hidden.device), rope.attention_factor)
    output, bias = ours.mix(ours.project(inputs), tables, batch.packed, again)
    output = output.squeeze(1) if bias is None else output.squeeze(1) + bias
    output.backward(weights)
    gradients = []
    for parameter in ours.parameters():
        gradients.append(parameter.main_grad.clone() if parameter.grad is None else parameter.grad.clone())
        parameter.main_grad.zero_()
    assert inputs.grad is not None
    return [output.detach(), inputs.grad, *gradients]


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("model", SIZES)
@pytest.mark.usefixtures("one_process")
def test_latent_attention_on_packed_rows_is_transformers_of_each_conversation(model: str, precision: str) -> None:
    """And what is made again in the backward pass is the same, on CPU bit for bit."""
    layer = transformers_layer(SIZES[model])
    architecture, ours = our_layer(layer, precision)
    tokens = sum(LENGTHS)
    row = Row(np.zeros(tokens, dtype=np.int64), np.ones(tokens, dtype=bool), np.array(LENGTHS))
    batch = make_micro_batch([row], 1, "token", device.current())
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    hidden, weights = torch.randn(2, batch.tokens.shape[1], 1, architecture.hidden_size).to(dtype)
    weights[tokens:] = 0  # padding
    rounded = hidden[:tokens, 0].double().requires_grad_()
    wanted = expected(layer, rounded)
    wanted.backward(weights[:tokens, 0].double())
    arguments = (architecture, hidden.to(device.current()), weights[:, 0].to(device.current()), batch)
    found, repeated = run(ours, *arguments, again=False), run(ours, *arguments, again=True)
    for one, other in zip(found, repeated, strict=True):
        # On a GPU gradients are summed in any order.
        assert torch.equal(one, other) if one.device.type == "cpu" else (one - other).abs().max() <= 1e-2 * one.abs().max()
    of_weights = of_ours(architecture, {name: each.grad for name, each in layer.named_parameters()})
    assert rounded.grad is not None
    theirs = [wanted.detach(), rounded.grad, *(of_weights[name] for name, _ in ours.named_parameters())]
    found[0], found[1] = found[0][:tokens], found[1][:tokens, 0]
    for one, other in zip(found, theirs, strict=True):
        difference = (one.cpu().double() - other).abs().max() / other.abs().max()
        assert difference <= TOLERANCES[precision], (one.shape, difference)
