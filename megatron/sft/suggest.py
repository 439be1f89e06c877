"""Suggests parallel sizes and recomputation for a model on given GPUs. `bash tools/plan MODEL --gpus 8 --gpu-memory 80`

MODEL is a folder with a config.json, that file, or a hub id, whose config.json is fetched unless a recipe uses the model.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.lora import LoRA, chosen_targets
from megatron.sft.families.trained import Trained
from megatron.sft.hf import hub
from megatron.sft.hf.published_configs import find_architecture
from megatron.sft.planning.first_checks import moments_problem
from megatron.sft.planning.fitting.memory_fit import CARDS
from megatron.sft.planning.fitting.recomputing import recompute_words
from megatron.sft.planning.layouts import Suggestion, largest_parts, suggest_layouts
from megatron.sft.planning.memory import GIB, MemorySettings, num_parameters
from megatron.sft.planning.options import share
from megatron.sft.planning.speed.step_time import MEASURED_GPUS, Cluster
from megatron.sft.reporting.metrics import clock
from megatron.sft.runtime.errors import OneLineParser, UserError, run

# GB on the label of cards that are asked for by name.
CARD_NAMES = {
    "L4": 24, "A10": 24, "3090": 24, "4090": 24, "A100-40": 40, "A6000": 48, "L40S": 48, "A100": 80, "H100": 80, "H200": 141,
}  # fmt: skip
SHOWN, EVERY = 5, 1000  # layouts
NUM_GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def table(suggestions: list[Suggestion], step_tokens: int, tokens: float) -> str:
    """The suggestions as lines, with the settings to write into a recipe. step_tokens: of a step; tokens: of the run, or 0."""
    lines = []
    for suggestion in suggestions:
        layout = suggestion.layout
        sizes = {
            "TENSOR_PARALLEL_SIZE": layout.tensor_parallel,
            "PIPELINE_PARALLEL_SIZE": layout.pipeline_parallel,
            "CONTEXT_PARALLEL_SIZE": layout.context_parallel,
            "EXPERT_PARALLEL_SIZE": layout.expert_parallel,
        }
        words = [f"{name}={size}" for name, size in sizes.items() if size > 1]
        words += ["SEQUENCE_PARALLEL=1"] * layout.sequence_parallel + [recompute_words(suggestion.settings)]
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in suggestion.memory.parts().items())
        here = step_tokens / suggestion.time.total
        time = f", {clock(tokens / here)} for {tokens / 1e6:,.0f} M tokens" if tokens else ""
        lines.append(f"  {' '.join(words)}  (DP {suggestion.data_parallel})")
        lost = {
            "communication": suggestion.time.communication,
            "waiting for pipeline stages": suggestion.time.bubble,
            "waiting for the processor": suggestion.time.launching,
        }
        shares = ", ".join(f"{name} {part / suggestion.time.total:.0%}" for name, part in lost.items() if part)
        shares = f" ({shares})" if shares else ""
        lines.append(
            f"      about {here / 1000:,.1f}k tokens/s{shares}{time}; {suggestion.memory.total / GIB:.1f} GiB: {parts}"
        )
    return "\n".join(lines)


def architecture_of(model: str) -> tuple[Architecture, str]:
    """The architecture of a folder, file or hub id, and where it was read."""
    try:
        return find_architecture(model)
    except UserError as unknown:
        if not hub.is_id(model):
            raise
        try:
            config = hub.fetch_config(model)
        except UserError as error:
            raise UserError(f"{unknown}; its config.json alone cannot be fetched: {error}") from None
    from megatron.sft.families.registry import read_architecture

    return read_architecture(config, f"config.json of {model}"), f"{model}'s config.json"


def _settings(asked: argparse.Namespace, architecture: Architecture) -> MemorySettings:
    lora = LoRA(asked.lora_rank, 32.0, *chosen_targets(architecture, "all")) if asked.lora_rank else None
    return MemorySettings(
        seq_length=asked.row_length,
        micro_batch_size=asked.micro_batch_size,
        precision=asked.precision,
        optimizer_precision=asked.optimizer_precision,
        optimizer_offload=asked.optimizer_offload,
        trained=Trained(lora),
    )


def _problem(settings: MemorySettings) -> str:
    """Why no run takes these settings of the optimizer; "" if one does."""
    if settings.trained.lora is not None and settings.optimizer_offload:
        return "OPTIMIZER_OFFLOAD with LORA_RANK: the state of adapters is small, set one of them to 0"
    return moments_problem(settings.precision, settings.optimizer_precision, settings.optimizer_offload)


def fewest_gpus(architecture: Architecture, gpu_bytes: int, settings: MemorySettings, batch: int) -> int | None:
    """The fewest GPUs of this size on which some layout fits."""
    fits = (count for count in NUM_GPUS if suggest_layouts(architecture, count, gpu_bytes, settings, batch, 1))
    return next(fits, None)


def what_helps(architecture: Architecture, asked: argparse.Namespace, gpu_bytes: int, settings: MemorySettings) -> str:
    """What is too large on these GPUs, and only those changes with which something fits."""
    count, batch = asked.gpus, asked.global_batch_size
    total, parts = largest_parts(architecture, count, settings, batch)
    shown = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts[:3])
    advice = []
    if (fewest := fewest_gpus(architecture, gpu_bytes, settings, batch)) and fewest > count:
        advice.append(f"--gpus {fewest}")
    shorter = [length for length in (16384, 8192, 4096, 2048, 1024) if length < settings.seq_length]
    changes = {f"--row-length {length}": replace(settings, seq_length=length) for length in shorter}
    offloaded, small = replace(settings, optimizer_offload=1.0), replace(settings, optimizer_precision="bf16")
    changes |= {"--optimizer-offload 1": offloaded, "--optimizer-precision bf16": small}
    changes["--optimizer-precision 8bit (see docs/performance.md)"] = replace(settings, optimizer_precision="8bit")
    for words, changed in changes.items():
        if _problem(changed):
            continue
        # The longest that fits, and the more precise, is there.
        if any(word in words and word in each for word in ("--row-length", "--optimizer-precision") for each in advice):
            continue
        if suggest_layouts(architecture, count, gpu_bytes, changed, batch, 1):
            advice.append(words)
    if not asked.lora_rank:
        lora = replace(settings, trained=Trained(LoRA(16, 32.0, *chosen_targets(architecture, "all"))), optimizer_offload=0.0)
        if suggest_layouts(architecture, count, gpu_bytes, lora, batch, 1):
            advice.append("--lora-rank 16 (adapters)" + " without --optimizer-offload" * (settings.optimizer_offload > 0))
    takes = f"the least is {total / GIB:.1f} GiB a GPU ({shown})"
    return f"{takes}: " + (f"take {', or '.join(advice)}" if advice else "take larger GPUs")


def main(argv: Sequence[str] | None = None) -> int:
    asked = _parse(argv)
    for name in ("gpus", "gpu_memory", "micro_batch_size", "global_batch_size"):
        if getattr(asked, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(asked, name)}: it must be at least 1")
    architecture, where = architecture_of(asked.model)
    for place, length in enumerate(asked.row_lengths):
        asked.row_length = length
        if place:
            print()
        suggest(asked, architecture, where)
    return 0


def suggest(asked: argparse.Namespace, architecture: Architecture, where: str) -> None:
    """Print what fits, for one length of rows."""
    # A card of 80 GB on its label has 79.1 GiB in nvidia-smi, one of 141 GB 139.8.
    gpu_bytes = int(CARDS.get(f"{asked.gpu_memory:g} GB", asked.gpu_memory) * GIB)
    settings = _settings(asked, architecture)
    if problem := _problem(settings):
        raise UserError(problem)
    trained = f"adapters of rank {asked.lora_rank}" if asked.lora_rank else "all weights"
    print(
        f"{where}: {num_parameters(architecture) / 1e6:,.1f} M parameters, {trained}, on {asked.gpus} "
        f"GPU{'s' * (asked.gpus > 1)} of {gpu_bytes / GIB:.1f} GiB, "
        f"rows of {asked.row_length:,} tokens, {asked.global_batch_size} rows a step"
    )
    found = suggest_layouts(architecture, asked.gpus, gpu_bytes, settings, asked.global_batch_size, EVERY)
    wanted = {"tensor_parallel": asked.tensor_parallel, "pipeline_parallel": asked.pipeline_parallel}
    wanted = {name: size for name, size in wanted.items() if size}
    as_wanted = [one for one in found if all(getattr(one.layout, name) == size for name, size in wanted.items())]
    if found and not as_wanted:
        sizes = " and ".join(f"--{name.replace('_', '-')} {size}" for name, size in wanted.items())
        fit = ", ".join(f"TP {one.layout.tensor_parallel} PP {one.layout.pipeline_parallel}" for one in found[:SHOWN])
        raise UserError(f"nothing fits {asked.gpus} GPUs with {sizes}: what fits is {fit}")
    found = as_wanted[:SHOWN]
    if not found:
        problem = f"nothing fits {asked.gpus} GPU{'s' * (asked.gpus > 1)} of {gpu_bytes / GIB:.1f} GiB"
        raise UserError(f"{problem}: {what_helps(architecture, asked, gpu_bytes, settings)}")
    fewest = fewest_gpus(architecture, gpu_bytes, settings, asked.global_batch_size)
    print(f"the fewest GPUs of this size: {fewest}")
    predicted = f"; more than {MEASURED_GPUS} GPUs were not measured: a prediction" if asked.gpus > MEASURED_GPUS else ""
    print(f"layouts that fit, estimated fastest first (for H100s, {Cluster().gpus_per_node} a host{predicted};")
    print("for another card set TOKENS_PER_SECOND in plan):")
    print(table(found, asked.row_length * asked.global_batch_size, asked.tokens * 1e6))


def card_size(text: str) -> float:
    """GB of a number or a card's name, for argparse."""
    name = text.upper().removeprefix("RTX").strip(" -_").removesuffix("GB")
    if name in CARD_NAMES:
        return CARD_NAMES[name]
    try:
        return float(name)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a size in GB nor one of {', '.join(CARD_NAMES)}") from None


def row_lengths(text: str) -> list[int]:
    """`4096,16384`, for argparse."""
    lengths = [int(part) for part in text.split(",")]
    if min(lengths) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return lengths


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu-memory", type=card_size, default=80, help="GB as on the card's label, or its name, such as L40S")
    parser.add_argument("--row-length", type=row_lengths, default=[16384], dest="row_lengths", help="or several: 4096,16384")
    parser.add_argument("--tensor-parallel", type=int, default=0, help="only layouts of this size; 0: of any")
    parser.add_argument("--pipeline-parallel", type=int, default=0)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--global-batch-size", type=int, default=128)
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp8", "fp32"), default="bf16")
    parser.add_argument("--optimizer-precision", choices=("fp32", "bf16", "8bit"), default="fp32")
    parser.add_argument("--optimizer-offload", type=share, default=0.0, help="share of the optimizer in CPU memory")
    parser.add_argument("--lora-rank", type=int, default=0, help="adapters of this rank; 0 trains all weights")
    parser.add_argument("--tokens", type=float, default=0, help="millions of tokens to train on, for the time")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
