"""Measures layouts on all GPUs of this machine, one after another, next to what `plan` expects of each; writes one table.

python -m benchmarks.cluster --suite two-gpus [--seconds 120] [--output FILE]
python -m benchmarks.cluster --case '--model Qwen/Qwen2.5-7B-Instruct --tensor-parallel 2 --row-length 8192'

A case is options of tools/benchmark_train; without --gpus it takes all GPUs. Each runs under a time limit of --seconds. The
losses are compared with those of one GPU on the same rows where the model fits one. A case that fails is a line too, and the
status is 1.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import train
from benchmarks.models import cut_architecture
from benchmarks.train import Measurement
from megatron.sft.families.lora import LoRA, chosen_targets
from megatron.sft.families.trained import Trained
from megatron.sft.model.layout import Layout
from megatron.sft.planning.memory import GIB, MemorySettings, estimate
from megatron.sft.planning.speed.run_time import RowLoad
from megatron.sft.planning.speed.step_time import StepTime, step_time
from megatron.sft.runtime import device
from megatron.sft.runtime.errors import OneLineParser, UserError, run

_SHORT = "--steps 6 --warm-up 3 --communication --against ''"
_DENSE = "--model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
_7B = "--model Qwen/Qwen2.5-7B-Instruct --row-length 8192 --optimizer-precision bf16 --recompute selective"
_32B = "--model Qwen/Qwen2.5-32B-Instruct --row-length 8192 --optimizer-precision bf16 --recompute full --micro-batches 8"
_8B = "--model deepseek-ai/DeepSeek-R1-Distill-Llama-8B --row-length 65536 --conversations 65536 --optimizer-precision bf16"
_MIXTURE = "--model Qwen/Qwen3-30B-A3B --recompute selective --optimizer-precision bf16"
SUITES = {
    "two-gpus": f"""
{_DENSE}
{_DENSE} --tensor-parallel 2
{_DENSE} --pipeline-parallel 2
{_DENSE} --pipeline-parallel 2 --virtual-pipeline 2
{_DENSE} --context-parallel 2
{_7B} --tensor-parallel 2
{_7B} --pipeline-parallel 2
{_MIXTURE} --layers 4 --expert-parallel 2
""",
    "four-gpus": f"""
{_DENSE}
{_DENSE} --tensor-parallel 2
{_DENSE} --pipeline-parallel 4 --micro-batches 8
{_DENSE} --context-parallel 4
{_DENSE} --tensor-parallel 2 --pipeline-parallel 2
{_7B} --tensor-parallel 4
{_7B} --tensor-parallel 2
{_MIXTURE} --layers 4 --expert-parallel 4
""",
    "eight-gpus": f"""
{_DENSE}
{_7B}
{_7B} --tensor-parallel 2
--model Qwen/Qwen2.5-14B-Instruct --row-length 8192 --optimizer-precision bf16 --recompute selective --tensor-parallel 4
{_32B} --tensor-parallel 8
{_32B} --tensor-parallel 4 --pipeline-parallel 2
{_32B} --tensor-parallel 4 --pipeline-parallel 2 --virtual-pipeline 2
{_8B} --context-parallel 4 --recompute full
{_MIXTURE} --row-length 8192 --expert-parallel 8
--model Qwen/Qwen2.5-72B-Instruct --lora-rank 16 --row-length 8192 --recompute full --tensor-parallel 8
{_7B} --precision fp8
""",
}
# A loss of 16-bit training in one layout may differ by this much, relatively, from that in another.
_NEAR = 1e-2


@dataclass(frozen=True)
class Expected:
    """What `plan` says of a case before it runs."""

    memory_gib: float
    fits: bool
    time: StepTime


def main(argv: Sequence[str] | None = None) -> int:
    asked = parse(argv)
    cases = [*asked.case, *(suite(asked.suite) if asked.suite else [])]
    if not cases:
        raise UserError(f"nothing to measure: give --suite ({', '.join(SUITES)}) or --case")
    if not device.has_gpu():
        raise UserError("no GPU is found: the benchmark measures GPUs")
    print(HEAD, flush=True)
    references: dict[str, list[float]] = {}
    good = True
    for case in cases:
        try:
            found, line = _measured(case, asked.seconds, references)
        except UserError as error:
            good, line = False, f"| {case} | {error} |"
        else:
            if asked.output:
                with asked.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"case": case, **found}) + "\n")
        print(line, flush=True)
    return 0 if good else 1


def suite(name: str) -> list[str]:
    """The cases of a suite."""
    return SUITES[name].strip().splitlines()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="benchmarks.cluster", description=__doc__)
    parser.add_argument("--suite", default="", choices=("", *SUITES))
    parser.add_argument("--case", action="append", default=[], help="options of benchmark_train; repeat it for several")
    parser.add_argument("--seconds", type=float, default=120.0, help="time limit of a case")
    parser.add_argument("--output", type=Path, help="file to which the results are added as JSON lines")
    return parser.parse_args(argv)


HEAD = (
    "| case | GPUs | tokens/s a GPU | TFLOP/s a GPU | MFU | peak GiB (plan) | seconds a step (plan) | communication, exposed "
    "| waiting for stages (plan) | loss from one GPU |\n" + "|---" * 10 + "|"
)


def _measured(case: str, seconds: float, references: dict[str, list[float]]) -> tuple[dict[str, object], str]:
    words = [*shlex.split(_SHORT), *shlex.split(case)]
    arguments = train.parse(words)
    if "--gpus" not in words:
        arguments.gpus = torch.cuda.device_count()
        words += ["--gpus", str(arguments.gpus)]
    arguments.stack = "ours"
    expected = expect(arguments)
    found = train.in_own_process("ours", arguments.gpus, words, seconds)
    apart = _apart(arguments, words, found, seconds, references)
    return {**asdict(found), "expected": asdict(expected), "apart": apart}, line(case, found, expected, apart)


def expect(arguments: argparse.Namespace) -> Expected:
    """Memory and time of the case by `plan`'s estimates."""
    architecture, layout = cut_architecture(arguments), arguments.layout
    copies = layout.data_parallel(arguments.gpus)
    lora = LoRA(arguments.lora_rank, 32.0, *chosen_targets(architecture, "all")) if arguments.lora_rank else None
    settings = MemorySettings(
        seq_length=arguments.row_length,
        num_micro_batches=arguments.micro_batches,
        precision=arguments.precision,
        fp8_recipe=arguments.fp8_recipe,
        recompute=arguments.recompute,
        recompute_layers=arguments.recompute_layers,
        optimizer_precision=arguments.optimizer_precision,
        optimizer_offload=arguments.optimizer_offload,
        trained=Trained(lora),
    )
    counts = train.rows_of(arguments, architecture.vocab_size, 1).counts[0]
    load = RowLoad(counts.tokens, counts.trained, counts.squared)
    memory = estimate(architecture, layout, copies, settings)
    fits = memory.fits(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else True
    return Expected(memory.tensors / GIB, fits, step_time(architecture, layout, copies, settings, load))


def _apart(
    arguments: argparse.Namespace, words: list[str], found: Measurement, seconds: float, references: dict[str, list[float]]
) -> float | None:
    """The largest relative difference of a loss from one GPU's on the same rows; None where one GPU does not hold the model."""
    copies = arguments.layout.data_parallel(arguments.gpus)
    alone = argparse.Namespace(**{**vars(arguments), "layout": Layout(), "gpus": 1})
    alone.micro_batches = arguments.micro_batches * copies
    if arguments.gpus == 1 or not expect(alone).fits:
        return None
    sizes = ("--tensor-parallel", "--pipeline-parallel", "--context-parallel", "--virtual-pipeline", "--expert-parallel")
    ones = [word for size in sizes for word in (size, "1")]
    whole = [*words, *ones, "--gpus", "1", "--micro-batches", str(alone.micro_batches)]
    key = shlex.join(sorted(str(item) for item in vars(alone).items()))
    if key not in references:
        references[key] = train.in_own_process("ours", 1, whole, seconds).losses
    return max(abs(mine - other) / other for mine, other in zip(found.losses, references[key], strict=True))


def line(case: str, found: Measurement, expected: Expected, apart: float | None) -> str:
    """A case's line of the table."""
    rate, peak = found.flops / found.seconds / 1e12 / found.gpus, device.peak_tflops()
    waiting, time = found.waiting, expected.time
    talked = f"{waiting.communication:.1%}, {waiting.exposed:.1%}" if waiting else ""
    stages = f"{waiting.between_stages:.1%} ({(time.bubble + time.pipeline) / time.total:.1%})" if waiting else ""
    step = f"{found.seconds:.3f} ({time.total:.3f}, {100 * (time.total / found.seconds - 1):+.0f} %)"
    loss = "" if apart is None else f"{apart:.1e}" + ("" if apart <= _NEAR else " TOO FAR")
    return (
        f"| {case} | {found.gpus} | {found.tokens_per_second / found.gpus:,.0f} | {rate:.0f} | "
        f"{100 * rate / peak if peak else 0:.1f} % | {found.memory_allocated:.1f} ({expected.memory_gib:.1f}) | "
        f"{step} | {talked} | {stages} | {loss} |"
    )


if __name__ == "__main__":
    run(main)
