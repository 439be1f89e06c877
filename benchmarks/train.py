"""Measures training steps on this machine's GPU: ours, and other stacks on the same rows, one after another.

`tools/benchmark_train [--model NAME|FOLDER] [--against peer,padded] …`; each stack runs in a separate process.
ours: this project. padded: this project on rows of one padded conversation each. peer, the strongest stack without it:
transformers with Liger's kernels and FlashAttention-2 (torch's varlen_attn), padding-free packing, pure bf16; with --lora-rank
PEFT's adapters on all linear layers, in float32 as PEFT makes them, or in bf16 (peer-bf16).

With --objective dpo the rows are packed pairs with stored log-probabilities of a reference; peer is TRL's DPOTrainer on the
same pairs, padded, with its fused head, Liger's layer kernels and precomputed references; sft is our SFT on the same rows.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.gpu import gemm_tflops
from benchmarks.models import cut_architecture
from benchmarks.pair_rows import PairRows, make_pair_rows
from benchmarks.rows import BenchmarkRows, make_rows
from benchmarks.waiting import Shares
from megatron.sft.families.flops import training_flops
from megatron.sft.model.layout import Layout
from megatron.sft.runtime import device, ranks
from megatron.sft.runtime.errors import OneLineParser, UserError, run

MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
# Six conversations that fill 16,384 tokens; weighted by tokens their mean length is 3,620.
CONVERSATIONS = (5200, 4100, 3000, 2100, 1200, 784)
STACKS = ("ours", "peer", "peer-bf16", "padded", "sft")


@dataclass(frozen=True)
class Measurement:
    """One stack's result. seconds: the median of the timed steps. tokens, trained_tokens, flops: the means of a step, all GPUs.

    memory: the peak in GiB of the GPU with the most, of tensors and of what torch's allocator held for them. gemm_tflops: of a
    large bf16 product on this card, which says how fast the card is. losses: of the timed steps. pairs: the mean of a step.
    padding: the share of padding in what is computed. waiting: with --communication, of ours.
    """

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
    pairs: float = 0
    padding: float = 0
    waiting: Shares | None = None

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
            raise UserError(f"--against {stack}: choose from {', '.join(STACKS[1:])}")
        found.append(in_own_process(stack, arguments.gpus, sys.argv[1:] if argv is None else argv))
        print(line(found[-1], found[0]), flush=True)
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(prog="benchmark_train", description=__doc__)
    parser.add_argument("--model", default=MODEL, help="a model folder, its config.json, or a name in assets/models.json")
    parser.add_argument("--layers", type=int, default=0, help="cut the model to this many layers, so that it fits")
    parser.add_argument("--skip-layers", type=int, default=0, help="begin after this many, such as dense ones before experts")
    parser.add_argument("--experts", type=int, default=0, help="cut a mixture's layers to this many experts")
    parser.add_argument("--row-length", type=int, default=16384)
    parser.add_argument("--conversations", default="", help="lengths in every row, or lognormal:MEAN; default: 6 that fill it")
    parser.add_argument("--trained", type=float, default=1.0, help="share of each conversation's tokens, at its end")
    parser.add_argument("--objective", default="sft", choices=("sft", "dpo"))
    parser.add_argument("--pair-means", default="256,320", help="--objective dpo: mean tokens of a prompt and of an answer")
    parser.add_argument("--peer-pairs", type=int, default=4, help="--objective dpo: pairs in a micro-batch of the peer")
    parser.add_argument("--gpus", type=int, default=0, help="for our stack; default: those of one copy. The peer runs on one")
    for name in ("tensor-parallel", "pipeline-parallel", "context-parallel", "virtual-pipeline"):
        parser.add_argument(f"--{name}", type=int, default=1, help="size of this dimension for our stack")
    parser.add_argument("--micro-batches", type=int, default=4, help="rows a step on each copy of the model")
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=6, help="steps before them")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--fp8-recipe", default="tensorwise")
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--recompute-layers", type=int, default=0)
    parser.add_argument("--optimizer-precision", default="fp32")
    parser.add_argument("--optimizer-offload", type=float, default=0.0, help="share of the optimizer's state in CPU memory")
    parser.add_argument("--expert-parallel", type=int, default=1, help="processes over which experts are spread")
    parser.add_argument("--lora-rank", type=int, default=0, help="train adapters of this rank; 0: all weights")
    parser.add_argument("--peer-recompute", action="store_true", help="gradient checkpointing for the peer")
    parser.add_argument("--memory-gib", type=float, default=0, help="the most that torch may allocate")
    parser.add_argument("--against", default="peer", help=f"other stacks: {', '.join(STACKS[1:])}; '' for none")
    parser.add_argument("--communication", action="store_true", help="measure what GPUs wait for in one step of ours")
    parser.add_argument("--profile", default="", help="file for a table of the kernels of one step; .json: a trace")
    parser.add_argument("--stack", default="", choices=("", *STACKS), help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    parsed.layout = Layout(
        parsed.tensor_parallel,
        parsed.pipeline_parallel,
        parsed.context_parallel,
        sequence_parallel=parsed.tensor_parallel > 1,
        virtual_pipeline=parsed.virtual_pipeline,
        expert_parallel=parsed.expert_parallel,
    )
    parsed.gpus = parsed.gpus or max(parsed.layout.model_size, parsed.expert_parallel)
    return parsed


def in_own_process(stack: str, gpus: int, argv: Sequence[str], seconds: float | None = None) -> Measurement:
    """Run one stack as a process, or one for each GPU; its last line of output is the measurement. seconds: its time limit."""
    command = [sys.executable, "-m", "benchmarks.train", *argv, "--stack", stack]
    if not stack.startswith("peer") and gpus > 1:
        launch = ["megatron.sft.launch", "--standalone", "--local-addr", "localhost", "--nproc-per-node", str(gpus), "-m"]
        command[2:2] = launch
    # In its own session, so that a time limit ends the launcher's processes as well.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ, start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise UserError(f"the stack {stack} was ended after {seconds:.0f} s") from None
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGINT)
            raise
    if process.returncode:
        reason = errors.strip().splitlines()[-1:] or ["no message"]
        print(errors[-4000:], file=sys.stderr)
        raise UserError(f"the stack {stack} ended with status {process.returncode}: {reason[0]}")
    found = json.loads(output.strip().splitlines()[-1])
    waiting = found.pop("waiting")
    return Measurement(**found, waiting=Shares(**waiting) if waiting else None)


def line(measured: Measurement, ours: Measurement) -> str:
    """One stack's result for people. Ratios are of trained tokens a second: padding is not work."""
    rate, peak = measured.flops / measured.seconds / 1e12 / measured.gpus, device.peak_tflops()
    share = f"{100 * rate / peak:.1f} % MFU | " if peak else ""
    ratio = ours.trained_tokens / ours.seconds / (measured.trained_tokens / measured.seconds)
    pairs = f"{measured.pairs / measured.seconds:.2f} pairs/s | padding {100 * measured.padding:.1f} % | " if ours.pairs else ""
    return (
        f"{measured.stack:<9}| {measured.seconds:.3f} s a step | {pairs}{measured.tokens_per_second:,.0f} tokens/s | "
        f"{measured.trained_tokens / measured.seconds:,.0f} trained tokens/s | {rate:.0f} TFLOP/s a GPU | {share}"
        f"peak {measured.memory_allocated:.1f} GiB (held {measured.memory_reserved:.1f}) | GEMM {measured.gemm_tflops:.0f} "
        f"TFLOP/s | loss {measured.losses[0]:.3f} -> {measured.losses[-1]:.3f} | ours / it {ratio:.2f}"
    )


def measure(arguments: argparse.Namespace) -> Measurement:
    """Run the stack `arguments.stack` in this process."""
    import torch

    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    is_peer = arguments.stack.startswith("peer")
    copies = 1 if is_peer else arguments.layout.data_parallel(arguments.gpus)
    rows_a_step = arguments.micro_batches * copies
    if arguments.memory_gib:
        torch.cuda.set_per_process_memory_fraction(arguments.memory_gib * 2**30 / torch.cuda.mem_get_info()[1])
    gemm = gemm_tflops()
    architecture = cut_architecture(arguments)
    rows = rows_of(arguments, architecture.vocab_size, 8 * rows_a_step)
    torch.cuda.reset_peak_memory_stats()
    seconds, losses, peaks, waiting = _steps(arguments, rows)
    timed = [rows.counts[index] for index in rows.used(arguments.warm_up, arguments.steps, rows_a_step)]
    measured = Measurement(
        stack=arguments.stack,
        seconds=statistics.median(seconds),
        tokens=sum(row.tokens for row in timed) // arguments.steps,
        trained_tokens=sum(row.trained for row in timed) // arguments.steps,
        flops=sum(
            training_flops(architecture, row.tokens, row.trained, row.squared, bool(arguments.lora_rank)) for row in timed
        )
        / arguments.steps,
        memory_allocated=peaks[0] / 2**30,
        memory_reserved=peaks[1] / 2**30,
        gemm_tflops=gemm,
        losses=losses,
        gpus=1 if is_peer else arguments.gpus,
        pairs=sum(row.pairs for row in timed) / arguments.steps,
        waiting=waiting,
    )
    return _of_peers_pairs(measured, arguments, rows) if is_peer and isinstance(rows, PairRows) else measured


def rows_of(arguments: argparse.Namespace, vocabulary: int, num_rows: int) -> BenchmarkRows:
    """The rows that the options ask for, random tokens."""
    if arguments.objective == "dpo":
        prompt, answer = map(int, arguments.pair_means.split(","))
        return make_pair_rows(arguments.row_length, (prompt, answer), vocabulary, num_rows)
    conversations = arguments.conversations or [size * arguments.row_length // 16384 for size in CONVERSATIONS]
    padded = arguments.stack == "padded"
    return make_rows(arguments.row_length, conversations, arguments.trained, vocabulary, num_rows, padded)


def _steps(arguments: argparse.Namespace, rows: BenchmarkRows) -> tuple[list[float], list[float], list[float], Shares | None]:
    if not arguments.stack.startswith("peer"):
        from benchmarks import ours

        return ours.measure_steps(arguments, rows)
    if isinstance(rows, PairRows):
        from benchmarks import peer_dpo

        return *peer_dpo.measure_steps(arguments, rows), None
    from benchmarks import peer

    return *peer.measure_steps(arguments, rows), None


def _of_peers_pairs(measured: Measurement, arguments: argparse.Namespace, rows: PairRows) -> Measurement:
    """The peer has other pairs in a step than our rows, the same ones in sum: its tokens and operations in proportion."""
    from benchmarks.peer_dpo import pairs_of_steps, peer_padding

    pairs, _ = pairs_of_steps(arguments, rows)
    timed = pairs[len(pairs) * arguments.warm_up // (arguments.warm_up + arguments.steps) :]
    tokens = sum(sum(pair.lengths) for pair in timed) / arguments.steps
    share = tokens / measured.tokens
    return replace(
        measured,
        tokens=int(tokens),
        trained_tokens=sum(len(pair.chosen) + len(pair.rejected) for pair in timed) // arguments.steps,
        flops=measured.flops * share,
        pairs=len(timed) / arguments.steps,
        padding=peer_padding(arguments, rows),
    )


if __name__ == "__main__":
    run(main)
