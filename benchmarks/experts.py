"""Measures the products of one layer of experts on this machine's GPU, in 16 and in 8 bits, and the casts that these need.

`python -m benchmarks.experts [--tokens N] [--experts N] [--chosen N] [--hidden N] [--width N]`; the defaults are a micro-batch
of 16,384 tokens in Qwen3-30B-A3B.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import gemm_tflops, time_on_gpu
from megatron.sft.model.experts.casts import WeightCasts, can_multiply, cast_columns, cast_rows, product
from megatron.sft.model.experts.routed_rows import routed_rows
from megatron.sft.runtime import device
from megatron.sft.runtime.errors import OneLineParser, UserError, run

REPEATS = 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="benchmarks.experts", description=__doc__)
    for name, default in (("tokens", 16384), ("experts", 128), ("chosen", 8), ("hidden", 2048), ("width", 768)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args(argv)
    if not device.has_gpu() or not can_multiply(torch.device("cuda", 0)):
        raise UserError("the benchmark measures 8-bit products of experts, which need a Hopper GPU and torch 2.10 or newer")
    print(f"8192^3 bf16 matrix product: {gemm_tflops():.0f} TFLOP/s")
    scores = torch.rand(arguments.tokens, arguments.experts, device="cuda")
    ends = routed_rows(scores.topk(arguments.chosen, dim=1).indices, arguments.experts).ends
    in_16, in_8, once = 0.0, 0.0, 0.0
    for outputs, inputs in ((2 * arguments.width, arguments.hidden), (arguments.hidden, arguments.width)):
        found = _measure(ends, arguments.tokens * arguments.chosen, outputs, inputs)
        in_16, in_8, once = in_16 + found[0], in_8 + found[1], once + found[2]
    print(
        f"a layer and micro-batch: {1000 * in_16:.2f} ms in 16 bits, {1000 * in_8:.2f} ms with 8-bit products and their casts; "
        f"in each step {1000 * once:.2f} ms for casts of the weights"
    )
    return 0


def _measure(ends: Tensor, num_rows: int, outputs: int, inputs: int) -> tuple[float, float, float]:
    """Seconds of all three products in 16 bits; of them with two in 8 bits, and casts of rows; of casts of weights."""
    rows, gradient = (torch.randn(num_rows, width, device="cuda", dtype=torch.bfloat16) for width in (inputs, outputs))
    weight = torch.randn(len(ends), outputs, inputs, device="cuda", dtype=torch.bfloat16) * inputs**-0.5
    casts, cast, cast_gradient = WeightCasts(weight), cast_rows(rows), cast_rows(gradient)
    print(f"{num_rows:,} rows, {len(ends)} experts, {inputs:,} to {outputs:,}")
    flops = 2.0 * num_rows * inputs * outputs

    def timed(what: str, work: Callable[[], Any], moved: int = 0) -> float:
        seconds = time_on_gpu(work, REPEATS)
        rate = f"{moved / seconds / 1e12:.2f} TB/s" if moved else f"{flops / seconds / 1e12:.0f} TFLOP/s"
        print(f"  {what:<46} {1000 * seconds:7.3f} ms  {rate}", flush=True)
        return seconds

    forward = partial(F.grouped_mm, rows, weight.transpose(1, 2), offs=ends)
    of_rows = partial(F.grouped_mm, gradient, weight, offs=ends)
    in_16 = [timed("16 bits: results", forward), timed("16 bits: gradient of the rows", of_rows)]
    of_weights = timed("16 bits: gradient of the weights", lambda: F.grouped_mm(gradient.t(), rows, offs=ends))
    in_8 = [
        timed("8 bits: results", lambda: product(cast, casts.by_output, ends)),
        timed("8 bits: gradient of the rows", lambda: product(cast_gradient, casts.by_input, ends)),
    ]
    for name, left, right in (("results", cast, casts.by_output), ("gradient of the rows", cast_gradient, casts.by_input)):
        timed(f"8 bits, sums in float32: {name}", partial(product, left, right, ends, fast=False))
    around = [
        timed("cast of the rows", lambda: cast_rows(rows), 3 * rows.numel()),
        timed("cast of the gradient", lambda: cast_rows(gradient), 3 * gradient.numel()),
    ]
    once = timed("cast of the weights for results", lambda: cast_rows(weight), 3 * weight.numel())
    once += timed("cast of the weights for the gradient", lambda: cast_columns(weight), 3 * weight.numel())
    pairs = ((forward, cast, casts.by_output), (of_rows, cast_gradient, casts.by_input))
    errors: list[float] = []
    for exact, left, right in pairs:
        expected = exact().float()
        for fast in (True, False):
            errors.append(float((product(left, right, ends, fast).float() - expected).norm() / expected.norm()))
    print("  relative differences, with fast and with float32 sums: " + ", ".join(f"{each:.4f}" for each in errors))
    return sum(in_16) + of_weights, sum(in_8) + sum(around) + of_weights, once


if __name__ == "__main__":
    run(main)
