"""Measures one layer of experts on this machine's GPU, in 16 and in 8 bits: its products, and what lies around them.

`python -m benchmarks.experts [--tokens N] [--experts N] [--chosen N] [--hidden N] [--width N]`; the defaults are a micro-batch
of 16,384 tokens in Qwen3-30B-A3B. Products are those of RECOMPUTE=selective, which writes rows and activations in 16 bits again
in the backward pass.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import gemm_tflops, time_on_gpu
from megatron.sft.model.experts.casts import WeightCasts, can_multiply, cast_columns, cast_rows, product
from megatron.sft.model.experts.routed_rows import (
    RoutedRows,
    gather_rows,
    routed_rows,
    weighted_swiglu,
    weighted_swiglu_and_cast,
)
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
    rows = routed_rows(scores.topk(arguments.chosen, dim=1).indices, arguments.experts)
    in_16, in_8 = _measure_between(rows, arguments.tokens, arguments.hidden, arguments.width)
    once = 0.0
    for outputs, inputs in ((2 * arguments.width, arguments.hidden), (arguments.hidden, arguments.width)):
        found = _measure_products(rows, outputs, inputs)
        in_16, in_8, once = in_16 + found[0], in_8 + found[1], once + found[2]
    print(
        f"a layer and micro-batch: {1000 * in_16:.2f} ms in 16 bits, {1000 * in_8:.2f} ms with two of three products in 8; "
        f"in each step {1000 * once:.2f} ms for casts of the weights"
    )
    return 0


def _timed(what: str, work: Callable[[], Any], flops: float = 0.0, moved: float = 0.0) -> float:
    """Seconds of some work, which it prints with its rate of operations or of bytes."""
    with torch.no_grad():
        seconds = time_on_gpu(work, REPEATS)
    rate = f"{flops / seconds / 1e12:.0f} TFLOP/s" if flops else f"{moved / seconds / 1e12:.2f} TB/s"
    print(f"  {what:<48} {1000 * seconds:7.3f} ms  {rate}", flush=True)
    return seconds


def _measure_between(rows: RoutedRows, num_tokens: int, hidden: int, width: int) -> tuple[float, float]:
    """Seconds of what makes the inputs of the forward products, in 16 and in 8 bits."""
    count = len(rows.tokens)
    print(f"{count:,} rows, {len(rows.ends)} experts: inputs of the forward products")
    tokens = torch.randn(num_tokens, hidden, device="cuda", dtype=torch.bfloat16)
    gate_up = torch.randn(count, 2 * width, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(count, device="cuda")
    in_16 = _timed("16 bits: rows gathered", lambda: gather_rows(tokens, rows), moved=4.0 * count * hidden)
    in_16 += _timed("16 bits: SwiGLU", lambda: weighted_swiglu(gate_up, weights), moved=6.0 * count * width)
    gathered = partial(_timed, work=lambda: cast_rows(tokens).rows(rows.tokens), moved=2.0 * count * hidden)
    in_8 = gathered("8 bits: tokens cast and rows gathered")
    active = partial(weighted_swiglu_and_cast, gate_up, weights, "silu", None)
    in_8 += _timed("8 bits: SwiGLU and cast", lambda: active(False), moved=5.0 * count * width)
    _timed("both: SwiGLU and cast", lambda: active(True), moved=7.0 * count * width)
    return in_16, in_8


def _measure_products(rows: RoutedRows, outputs: int, inputs: int) -> tuple[float, float, float]:
    """Seconds of all three products in 16 bits; of them with two in 8 bits and the gradient's cast; of the weights' casts."""
    count, ends = len(rows.tokens), rows.ends
    print(f"{inputs:,} to {outputs:,}")
    values, gradient = (torch.randn(count, width, device="cuda", dtype=torch.bfloat16) for width in (inputs, outputs))
    weight = torch.randn(len(ends), outputs, inputs, device="cuda", dtype=torch.bfloat16) * inputs**-0.5
    casts, cast, cast_gradient = WeightCasts(weight), cast_rows(values), cast_rows(gradient)
    timed = partial(_timed, flops=2.0 * count * inputs * outputs)
    pairs = {
        "results": (partial(F.grouped_mm, values, weight.transpose(1, 2), offs=ends), cast, casts.by_output),
        "gradient of the rows": (partial(F.grouped_mm, gradient, weight, offs=ends), cast_gradient, casts.by_input),
    }
    in_16 = in_8 = timed("16 bits: gradient of the weights", lambda: F.grouped_mm(gradient.t(), values, offs=ends))
    for name, (wide, left, right) in pairs.items():
        in_16 += timed(f"16 bits: {name}", wide)
        in_8 += timed(f"8 bits: {name}", partial(product, left, right, ends))
        timed(f"8 bits, sums in float32: {name}", partial(product, left, right, ends, fast=False))
        expected = wide().float()
        errors = [_difference(product(left, right, ends, fast), expected) for fast in (True, False)]
        print(f"    relative differences from 16 bits: {errors[0]:.4f}, with sums in float32 {errors[1]:.4f}")
    _timed("cast of the rows, by itself", lambda: cast_rows(values), moved=3.0 * values.numel())
    in_8 += _timed("cast of the gradient", lambda: cast_rows(gradient), moved=3.0 * gradient.numel())
    once = _timed("cast of the weights, by output", lambda: cast_rows(weight), moved=3.0 * weight.numel())
    once += _timed("cast of the weights, by input", lambda: cast_columns(weight), moved=3.0 * weight.numel())
    return in_16, in_8, once


def _difference(given: Tensor, expected: Tensor) -> float:
    """Relative, of the whole tensors."""
    return float((given.float() - expected).norm() / expected.norm())


if __name__ == "__main__":
    run(main)
