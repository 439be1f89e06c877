"""Suggests parallel sizes and recomputation for a model on given GPUs. `bash tools/plan MODEL --gpus 8 --gpu-memory 80`

MODEL is a folder with a config.json, that file, or a hub id that a recipe uses. Nothing is downloaded or started.
"""

from collections.abc import Sequence

from megatron.sft.hf.published_configs import find_architecture
from megatron.sft.planning.layouts import Suggestion, suggest_layouts
from megatron.sft.planning.memory import GIB, MemorySettings, num_parameters
from megatron.sft.planning.memory_fit import CARDS
from megatron.sft.runtime.errors import OneLineParser, UserError, run


def table(suggestions: list[Suggestion]) -> str:
    """The suggestions as lines for people, with the settings to write into a recipe."""
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
        words += ["SEQUENCE_PARALLEL=1"] * layout.sequence_parallel + [f"RECOMPUTE={suggestion.recompute}"]
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in suggestion.memory.parts().items())
        lines.append(f"  {' '.join(words)}  (DP {suggestion.data_parallel})")
        lines.append(f"      {suggestion.memory.total / GIB:.1f} GiB: {parts}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu-memory", type=float, default=80, help="GB as on the card's label")
    parser.add_argument("--row-length", type=int, default=16384)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--global-batch-size", type=int, default=128)
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp8", "fp32"), default="bf16")
    parser.add_argument("--optimizer-precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--optimizer-offload", action="store_true")
    asked = parser.parse_args(argv)
    for name in ("gpus", "gpu_memory", "row_length", "micro_batch_size", "global_batch_size"):
        if getattr(asked, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(asked, name)}: it must be at least 1")
    architecture, where = find_architecture(asked.model)
    # A card of 80 GB on its label has 79.1 GiB in nvidia-smi, one of 141 GB 139.8.
    gpu_bytes = int(CARDS.get(f"{asked.gpu_memory:g} GB", asked.gpu_memory) * GIB)
    settings = MemorySettings(
        seq_length=asked.row_length,
        micro_batch_size=asked.micro_batch_size,
        precision=asked.precision,
        optimizer_precision=asked.optimizer_precision,
        optimizer_offload=asked.optimizer_offload,
    )
    print(
        f"{where}: {num_parameters(architecture) / 1e6:,.1f} M parameters on {asked.gpus} GPUs of {gpu_bytes / GIB:.1f} GiB, "
        f"rows of {asked.row_length:,} tokens, {asked.global_batch_size} rows a step"
    )
    found = suggest_layouts(architecture, asked.gpus, gpu_bytes, settings, asked.global_batch_size)
    if not found:
        raise UserError(
            f"nothing fits {asked.gpus} GPU{'s' * (asked.gpus > 1)} of {gpu_bytes / GIB:.1f} GiB: take more GPUs, shorter "
            "rows, --optimizer-precision bf16 or --optimizer-offload"
        )
    print("layouts that fit, estimated fastest first:")
    print(table(found))
    return 0


if __name__ == "__main__":
    run(main)
