"""Compares a mixture whose experts are computed in 8 bits with one in 16 or 32, and with itself spread over all processes,
recomputed, and with adapters: fp8_experts_worker.py CONFIG... (config.json of models with experts). On a GPU or the CPU.
"""

import copy
import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.lora import LoRA, adapted_weights
from megatron.sft.families.registry import read_architecture
from megatron.sft.model import process_groups
from megatron.sft.model.config import transformer_config
from megatron.sft.model.experts.sparse_mlp import SparseMLP
from megatron.sft.model.layout import Layout
from megatron.sft.model.lora.adapters import Adapter, Split, _rows
from megatron.sft.runtime import device

TOKENS = 96


def difference(given: Tensor, expected: Tensor) -> float:
    """Relative, of the whole tensors."""
    return float((given.float() - expected.float()).norm() / expected.float().norm())


def random(name: str, *shape: int) -> Tensor:
    """The same for a name on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))


def mixture(architecture: Architecture, config: Any, spread: int, in_8_bits: bool) -> SparseMLP:
    """spread: processes that share the experts."""
    config = copy.copy(config)
    config.fp8, config.expert_model_parallel_size = "hybrid" if in_8_bits else None, spread
    assert architecture.moe is not None
    layer = SparseMLP(config, architecture.moe, (torch.nn.Linear, torch.nn.Linear), architecture.activation)
    first = layer.experts.num_local * (parallel_state.get_expert_model_parallel_rank() if spread > 1 else 0)
    for name, parameter in layer.named_parameters():
        values = parameter.shape[-1] ** -0.5 * random(name, architecture.moe.num_experts, *parameter.shape[1:])
        if "experts" in name:
            values = values[first : first + layer.experts.num_local]
        parameter.data.copy_(values)
    return layer.to(device.current())


def add_adapters(layer: SparseMLP, architecture: Architecture) -> list[Tensor]:
    """To all experts, with factors that are not zero; returns them."""
    lora = LoRA(rank=16, alpha=32.0, targets=("down_proj", "gate_proj", "up_proj"), experts=True)
    layer.requires_grad_(False)
    group, found = parallel_state.get_expert_tensor_parallel_group(), []
    for name in ("linear_fc1", "linear_fc2"):
        linear = layer.experts.get_submodule(name)
        weights = [
            w for w in adapted_weights(architecture, lora) if w.entry.layer == 0 and f"{name}.weight" in w.entry.megatron
        ]
        weights = weights[: layer.experts.num_local]
        split = Split(name == "linear_fc1", 0, 1, group, False, expert=True)
        outputs = linear.weight.shape[1]  # type: ignore[union-attr,index]
        rows = [_rows(weights[0].entry, place, architecture, outputs, split) for place in weights[0].projections]
        adapter = Adapter(weights, linear.weight, rows, lora, split).to(device.current())  # type: ignore[arg-type]
        for part, parameter in adapter.named_parameters():
            parameter.data.copy_(0.1 * random(part, *parameter.shape))
            found.append(parameter)
        linear.adapter = adapter  # type: ignore[assignment]
        linear.forward = partial(adapter, linear.forward)  # type: ignore[method-assign]
    return found


def run(layer: SparseMLP, again: bool, parameters: list[Tensor]) -> list[Tensor]:
    """This rank's output, gradient of the hidden states, and gradients of these parameters."""
    rank, like = torch.distributed.get_rank(), layer.router.weight
    hidden = random(f"hidden {rank}", TOKENS, 1, like.shape[1]).to(like).requires_grad_()
    packed: Any = SimpleNamespace(real=None, balance_scale=None)
    output, _ = layer(hidden, packed, again)
    results = torch.autograd.grad(output, [hidden, *parameters], random(f"upstream {rank}", *output.shape).to(like))
    return [output.detach(), *results]


def compare(architecture: Architecture) -> None:
    size = torch.distributed.get_world_size()
    config = transformer_config(architecture, Layout(expert_parallel=size), "bf16" if device.has_gpu() else "fp32")
    here, exact = (mixture(architecture, config, 1, in_8_bits) for in_8_bits in (True, False))
    assert here.experts.in_8_bits and not exact.experts.in_8_bits
    narrow, wide = (run(layer, False, list(layer.experts.parameters())) for layer in (here, exact))
    for index, (given, expected) in enumerate(zip(narrow, wide, strict=True)):
        # Two products, forward and backward, of factors that are rounded by 2.6 %. The first are the output, the hidden
        # states' gradient and that of a weight; that of the last bias needs no product.
        assert (index > 2 or difference(given, expected) > 1e-2) and difference(given, expected) < 8e-2, index
    for given, expected in zip(run(here, True, list(here.experts.parameters())), narrow, strict=True):
        torch.testing.assert_close(given, expected, rtol=0, atol=0)
    if size > 1:
        spread = mixture(architecture, config, size, in_8_bits=True)
        first = spread.experts.num_local * parallel_state.get_expert_model_parallel_rank()
        for again in (False, True):
            found = run(spread, again, list(spread.experts.parameters()))
            for index, (given, expected) in enumerate(zip(found, narrow, strict=True)):
                if index > 1:
                    expected = expected.clone()
                    torch.distributed.all_reduce(expected)
                    expected = expected[first : first + spread.experts.num_local]
                # Sums in another order can round a value to the next of 8 bits.
                assert difference(given, expected) < 2e-3, (index, difference(given, expected))
    if not architecture.moe.expert_bias:  # type: ignore[union-attr]
        with_adapters = mixture(architecture, config, 1, in_8_bits=True)
        factors = add_adapters(with_adapters, architecture)
        kept, made_again = (run(with_adapters, again, factors) for again in (False, True))
        assert difference(kept[0], narrow[0]) > 0.1
        for given, expected in zip(made_again, kept, strict=True):
            torch.testing.assert_close(given, expected, rtol=0, atol=0)


def main() -> None:
    device.prepare()
    with process_groups.parallel(Layout(expert_parallel=int(os.environ.get("WORLD_SIZE", "1")))):
        for path in sys.argv[1:]:
            compare(read_architecture(json.loads(Path(path).read_text()), path))
    print("equal", flush=True)


if __name__ == "__main__":
    main()
