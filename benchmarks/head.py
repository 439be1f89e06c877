"""Measures the loss head alone on this machine's GPU: forward and backward, its memory, and a part of the tokens trained.

`tools/benchmark_head [--tokens N] [--hidden H] [--vocabulary V]`; counts 6 * tokens * hidden * vocabulary operations, two for
each of the three products (logits, gradients of hidden states and weight).
"""

import argparse
from collections.abc import Sequence

from benchmarks.gpu import gemm_tflops, time_on_gpu
from megatron.sft.model import process_groups
from megatron.sft.model.layout import Layout
from megatron.sft.runtime import device
from megatron.sft.runtime.errors import OneLineParser, UserError, run

REPEATS = 30


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="benchmark_head", description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--vocabulary", type=int, default=151936)
    arguments = parser.parse_args(argv)
    if not device.has_gpu():
        raise UserError("no GPU is found: the benchmark measures GPUs")
    device.prepare()
    print(f"8192^3 bf16 matrix product: {gemm_tflops():.0f} TFLOP/s")
    with process_groups.parallel(Layout()):
        whole = _measure(arguments, 1.0)
        for share in (0.6, 0.4):
            print(f"  {100 * share:.0f} % of the tokens trained: {100 * _measure(arguments, share) / whole:.0f} % of that time")
    return 0


def _measure(arguments: argparse.Namespace, trained: float) -> float:
    """Seconds of one forward and backward pass, which it prints with the memory. trained: the share of the tokens.

    Inputs are random; the weight's gradient is added to a float32 buffer, as in training.
    """
    import torch
    from megatron.core import parallel_state

    from megatron.sft.model.cross_entropy import Targets, weighted_cross_entropy

    here, kind = torch.device("cuda"), torch.bfloat16
    hidden = torch.randn(arguments.tokens, arguments.hidden, device=here, dtype=kind, requires_grad=True)
    weight = torch.nn.Parameter(0.02 * torch.randn(arguments.vocabulary, arguments.hidden, device=here, dtype=kind))
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    hidden_indices = torch.randperm(arguments.tokens, device=here)[: int(arguments.tokens * trained)].sort().values
    ids = torch.randint(0, arguments.vocabulary, (len(hidden_indices),), device=here)
    targets = Targets(hidden_indices, ids, torch.ones(len(hidden_indices), device=here))
    group = parallel_state.get_tensor_model_parallel_group()

    def step() -> None:
        hidden.grad = weight.grad = None
        chosen = hidden.index_select(0, targets.hidden_indices)
        loss, _ = weighted_cross_entropy(chosen, weight, targets, arguments.vocabulary, group)
        loss.backward()

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = time_on_gpu(step, REPEATS)
    extra = (torch.cuda.max_memory_allocated() - before) / 2**30
    flops = 6.0 * len(hidden_indices) * arguments.hidden * arguments.vocabulary
    print(
        f"{len(hidden_indices):,} trained tokens x {arguments.hidden} x {arguments.vocabulary:,}: {1000 * seconds:.2f} ms, "
        f"{flops / seconds / 1e12:.0f} TFLOP/s, {extra:.2f} GiB in addition to inputs, weight and its gradient"
    )
    return seconds


if __name__ == "__main__":
    run(main)
