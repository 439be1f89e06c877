"""Compares adapters of a layer that holds several experts with one adapter an expert, in as many processes as it is started in,
which share every expert. grouped_worker.py CONFIG (config.json of a model with experts)."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron.sft.families.lora import AdaptedWeight, LoRA, adapted_weights
from megatron.sft.families.registry import read_architecture
from megatron.sft.model import process_groups
from megatron.sft.model.layout import Layout
from megatron.sft.model.lora.adapters import Adapter, HeldRows, Split, _rows
from megatron.sft.runtime import device

COUNTS = [5, 0, 7]


def compare(weights: list[AdaptedWeight], outputs: int, inputs: int, split: Split, rows: list[HeldRows], lora: LoRA) -> None:
    """Results and all gradients, on every rank. outputs, inputs: of this rank."""
    torch.manual_seed(0 if split.column else split.rank)  # a row-parallel layer's ranks hold other columns
    tokens = torch.randn(sum(COUNTS), inputs, dtype=torch.float64)
    bases = torch.randn(len(COUNTS), outputs, inputs, dtype=torch.float64)
    ends = torch.tensor(COUNTS).cumsum(0).int()
    grouped = Adapter(weights, bases, rows, lora, split)
    singles = [Adapter([weight], base, rows, lora, split) for weight, base in zip(weights, bases, strict=True)]
    for name, parameter in grouped.named_parameters():
        replicated = name.endswith("_A") == split.column
        generator = torch.Generator().manual_seed(7 if replicated else split.rank)
        parameter.data.normal_(generator=generator)
        for number, single in enumerate(singles):
            single.get_parameter(name).data.copy_(parameter[number])

    def layer(inputs: Tensor, ends: Tensor) -> Any:
        return torch.cat([x @ w.t() for x, w in zip(inputs.split(COUNTS), bases, strict=True)]), None

    ours, theirs = (tokens.clone().requires_grad_() for _ in range(2))
    first, _ = grouped(layer, ours, ends)
    parts = zip(singles, theirs.split(COUNTS), bases, strict=True)
    second = torch.cat([single(lambda x, w=base: (x @ w.t(), None), part)[0] for single, part, base in parts])
    upstream = torch.randn(first.shape, dtype=torch.float64)
    torch.testing.assert_close(first, second)
    for result in (first, second):
        result.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)
    for name, parameter in grouped.named_parameters():
        expected = torch.stack([single.get_parameter(name).grad for single in singles])
        assert expected[0].any() and not expected[1].any(), name
        torch.testing.assert_close(parameter.grad, expected)


def main() -> None:
    device.prepare()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    architecture = read_architecture(json.loads(Path(sys.argv[1]).read_text()), sys.argv[1])
    lora = LoRA(rank=3, alpha=6.0, targets=("down_proj", "gate_proj", "up_proj"), experts=True)
    with process_groups.parallel(Layout(tensor_parallel=size)):
        group, rank = parallel_state.get_expert_tensor_parallel_group(), parallel_state.get_expert_tensor_parallel_rank()
        for column in (True, False):
            name = "linear_fc1" if column else "linear_fc2"
            weights = [w for w in adapted_weights(architecture, lora) if w.entry.layer == 0 and name in w.entry.megatron]
            weights = weights[: len(COUNTS)]
            split = Split(column, rank, size, group, False, expert=True)
            width, hidden = architecture.moe.ffn_hidden_size, architecture.hidden_size  # type: ignore[union-attr]
            outputs, inputs = (2 * width // size, hidden) if column else (hidden, width // size)
            rows = [_rows(weights[0].entry, place, architecture, outputs, split) for place in weights[0].projections]
            compare(weights, outputs, inputs, split, rows, lora)


if __name__ == "__main__":
    main()
