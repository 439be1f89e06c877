"""Measures training steps on this machine's GPU: ours, and the strongest plain stack on the same rows, one after another.

`tools/benchmark_train [--model NAME|FOLDER] [--against peer,padded,head] …`; each stack runs in a process of its own.
The peer is transformers with Liger's kernels and FlashAttention-2 (torch's varlen_attn), padding-free packing, pure bf16.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from benchmarks.rows import BenchmarkRows, make_rows
from megatron.sft.families.flops import training_flops
from megatron.sft.hf.published_configs import find_architecture
from megatron.sft.model import process_groups
from megatron.sft.model.layout import Layout
from megatron.sft.planning.options import TrainOptions
from megatron.sft.runtime import device, ranks
from megatron.sft.runtime.errors import OneLineParser, UserError, run

MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
# Six conversations that fill 16,384 tokens; weighted by tokens their mean length is 3,620.
CONVERSATIONS = (5200, 4100, 3000, 2100, 1200, 784)
STACKS = ("ours", "peer", "padded")


@dataclass(frozen=True)
class Measurement:
    """Medians of the timed steps. Memory in GiB, of the GPU with most: of tensors, and what torch's allocator held for them."""

    stack: str
    seconds: float
    tokens: int
    trained_tokens: int
    flops: float
    memory_allocated: float
    memory_reserved: float
    gemm_tflops: float
    losses: list[float]
    gpus: int = 1

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if not device.has_gpu():
        raise UserError("no GPU is found: the benchmark measures GPUs")
    if arguments.stack:
        measured = measure(arguments)
        if ranks.is_rank_0():
            print(json.dumps(asdict(measured)))
        return 0
    found = []
    for stack in ["ours", *(word for word in arguments.against.split(",") if word)]:
        if stack not in STACKS:
            raise UserError(f"--against {stack}: the stacks are {', '.join(STACKS[1:])}")
        found.append(_in_own_process(stack, arguments.gpus, sys.argv[1:] if argv is None else argv))
        print(line(found[-1], found[0]), flush=True)
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(prog="benchmark_train", description=__doc__)
    parser.add_argument(
        "--model", default=MODEL, help="a model folder, its config.json, or a name in assets/models.json"
    )
    parser.add_argument("--row-length", type=int, default=16384)
    parser.add_argument(
        "--conversations", default="", help="lengths in every row, or lognormal:MEAN; default: 6 that fill it"
    )
    parser.add_argument("--trained", type=float, default=1.0, help="share of each conversation's tokens, at its end")
    parser.add_argument("--gpus", type=int, default=0, help="for our stack; default: one copy of it. The peer has one")
    for name in ("tensor-parallel", "pipeline-parallel", "context-parallel", "virtual-pipeline"):
        parser.add_argument(f"--{name}", type=int, default=1, help="size of this dimension for our stack")
    parser.add_argument("--micro-batches", type=int, default=4, help="rows a step on each copy of the model")
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=6, help="steps before them")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--fp8-recipe", default="tensorwise")
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--optimizer-precision", default="fp32")
    parser.add_argument("--optimizer-offload", action="store_true")
    parser.add_argument("--memory-gib", type=float, default=0, help="let torch hold no more than this")
    parser.add_argument("--against", default="peer", help=f"stacks beside ours: {', '.join(STACKS[1:])}; '' for none")
    parser.add_argument("--profile", default="", help="file for a table of the kernels of one step")
    parser.add_argument("--stack", default="", choices=("", *STACKS), help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    parsed.layout = Layout(
        parsed.tensor_parallel,
        parsed.pipeline_parallel,
        parsed.context_parallel,
        sequence_parallel=parsed.tensor_parallel > 1,
        virtual_pipeline=parsed.virtual_pipeline,
    )
    parsed.gpus = parsed.gpus or parsed.layout.model_size
    return parsed


def _in_own_process(stack: str, gpus: int, argv: Sequence[str]) -> Measurement:
    """Run one stack as a process (or one a GPU); its last line is the measurement."""
    command = [sys.executable, "-m", "benchmarks.train", *argv, "--stack", stack]
    if stack != "peer" and gpus > 1:
        start = [
            "megatron.sft.launch",
            "--standalone",
            "--local-addr",
            "localhost",
            "--nproc-per-node",
            str(gpus),
            "-m",
        ]
        command[2:3] = [*start, "benchmarks.train"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1:] or ["no message"]
        print(result.stderr[-4000:], file=sys.stderr)
        raise UserError(f"the stack {stack} ended with status {result.returncode}: {reason[0]}")
    return Measurement(**json.loads(result.stdout.strip().splitlines()[-1]))


def line(measured: Measurement, ours: Measurement) -> str:
    """One stack's result as it is printed."""
    rate, peak = measured.flops / measured.seconds / 1e12 / measured.gpus, device.peak_tflops()
    share = f"{100 * rate / peak:.1f} % MFU | " if peak else ""
    ratio = ours.trained_tokens / ours.seconds / (measured.trained_tokens / measured.seconds)
    return (
        f"{measured.stack:<7}| {measured.seconds:.3f} s a step | {measured.tokens_per_second:,.0f} tokens/s | "
        f"{measured.trained_tokens / measured.seconds:,.0f} trained tokens/s | {rate:.0f} TFLOP/s a GPU | {share}"
        f"peak {measured.memory_allocated:.1f} GiB (held {measured.memory_reserved:.1f}) | GEMM {measured.gemm_tflops:.0f} "
        f"TFLOP/s | loss {measured.losses[0]:.3f} -> {measured.losses[-1]:.3f} | ours / it {ratio:.2f}"
    )


def measure(arguments: argparse.Namespace) -> Measurement:
    """Run one stack in this process."""
    import torch

    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    copies = 1 if arguments.stack == "peer" else arguments.layout.data_parallel(arguments.gpus)
    rows_a_step = arguments.micro_batches * copies
    if arguments.memory_gib:
        torch.cuda.set_per_process_memory_fraction(arguments.memory_gib * 2**30 / torch.cuda.mem_get_info()[1])
    gemm = gemm_tflops()
    architecture, _ = find_architecture(arguments.model)
    rows = make_rows(
        arguments.row_length,
        arguments.conversations or [size * arguments.row_length // 16384 for size in CONVERSATIONS],
        arguments.trained,
        architecture.vocab_size,
        num_rows=8 * rows_a_step,
        padded=arguments.stack == "padded",
    )
    torch.cuda.reset_peak_memory_stats()
    if arguments.stack == "peer":
        from benchmarks.peer import measure_steps

        seconds, losses = measure_steps(arguments, rows)
        peaks = _peaks()
    else:
        seconds, losses, peaks = _our_steps(arguments, rows)
    timed = [rows.counts[n] for n in rows.used(arguments.warm_up, arguments.steps, rows_a_step)]
    return Measurement(
        stack=arguments.stack,
        seconds=statistics.median(seconds),
        tokens=sum(row.tokens for row in timed) // arguments.steps,
        trained_tokens=sum(row.trained for row in timed) // arguments.steps,
        flops=sum(training_flops(architecture, r.tokens, r.trained, r.squared) for r in timed) / arguments.steps,
        memory_allocated=peaks[0] / 2**30,
        memory_reserved=peaks[1] / 2**30,
        gemm_tflops=gemm,
        losses=losses,
        gpus=1 if arguments.stack == "peer" else arguments.gpus,
    )


def gemm_tflops(size: int = 8192) -> float:
    """What a bf16 matrix product of random numbers reaches on this card."""
    import torch

    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = time_on_gpu(lambda: a @ b, 20)
    return 2 * size**3 / seconds / 1e12


def time_on_gpu(work: Callable[[], Any], repeats: int) -> float:
    """Median seconds of `work`, by events on the GPU, after three runs that do not count."""
    import torch

    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats + 3)]
    for start, end in pairs:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs[3:]) / 1000


def _peaks() -> list[float]:
    """Largest numbers of bytes so far: of tensors, and what torch's allocator held for them."""
    import torch

    return [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]


def _our_steps(arguments: argparse.Namespace, rows: BenchmarkRows) -> tuple[list[float], list[float], list[float]]:
    """Seconds and losses of the timed steps, through the engine and the feeder that train users' models, and `_peaks` of the
    GPU with most."""
    import torch

    from megatron.sft.training.engine import Engine
    from megatron.sft.training.feeder import Feeder

    device.prepare()
    plan = benchmark_plan(arguments, rows)
    with process_groups.parallel(plan.layout):
        engine = Engine(plan)
        _randomise(engine)
        feeder, size = Feeder(plan), plan.options.global_batch_size
        seconds, losses, consumed = [], [], 0
        for step in range(arguments.warm_up + arguments.steps):
            batches = feeder.training(consumed)
            consumed += size
            if arguments.profile and step == arguments.warm_up:
                _profile(partial(engine.train_step, batches), arguments.profile)
                continue
            torch.cuda.synchronize()
            started = time.perf_counter()
            result = engine.train_step(batches)
            torch.cuda.synchronize()
            if step >= arguments.warm_up:
                seconds.append(time.perf_counter() - started)
                losses.append(result.loss.reduce()[0])
        peaks = torch.tensor(_peaks(), device=device.current(), dtype=torch.float64)
        torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
    return seconds, losses, peaks.tolist()


def benchmark_plan(arguments: argparse.Namespace, rows: BenchmarkRows) -> Any:
    """A run of these rows in their order, as the training loop would have resolved it."""
    from pathlib import Path

    import numpy as np

    from megatron.sft.checkpoint.folder import Checkpoint
    from megatron.sft.planning.run_plan import RunPlan

    architecture, _ = find_architecture(arguments.model)
    copies = arguments.layout.data_parallel(arguments.gpus)
    options = replace(
        TrainOptions(load=Path(), data_path=Path(), save=Path()),
        global_batch_size=arguments.micro_batches * copies,
        precision=arguments.precision,
        fp8_recipe=arguments.fp8_recipe,
        recompute=arguments.recompute,
        optimizer_precision=arguments.optimizer_precision,
        optimizer_offload=arguments.optimizer_offload,
    )
    steps = arguments.warm_up + arguments.steps
    return RunPlan(
        options=options,
        layout=arguments.layout,
        data_parallel=copies,
        architecture=architecture,
        start=Checkpoint(Path(), 0, "", {}),
        resume=False,
        rows=rows,  # type: ignore[arg-type]
        training_rows=np.arange(len(rows)),
        validation_rows=np.arange(0),
        train_iters=steps,
        warmup_iters=1,
        wsd_decay_iters=1,
        eval_iters=0,
    )


def _randomise(engine: Any) -> None:
    """Weights as a model starts with them: normal, 0.02; norms 1."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for module in engine.chunks:
            for name, parameter in module.named_parameters():
                if "norm" in name:
                    parameter.fill_(1.0)
                elif name.endswith("bias"):
                    parameter.zero_()
                else:
                    parameter.normal_(0.0, 0.02)
    engine.optimizer.reload_model_params()


def _profile(step: Callable[[], Any], path: str) -> None:
    """Write the GPU time of one step by kernel."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        step()
        torch.cuda.synchronize()
    with open(path, "w", encoding="utf-8") as file:
        file.write(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=60, max_name_column_width=100))


if __name__ == "__main__":
    run(main)
