"""What a run asks of a GPU's memory, how much this machine's GPU has, and for every usual card the fewest that hold it."""

from dataclasses import replace

from megatron.sft.families.architecture import Architecture
from megatron.sft.model.layout import Layout
from megatron.sft.planning.memory import GIB, MemorySettings, cheapest_recompute, estimate
from megatron.sft.planning.options import TrainOptions
from megatron.sft.runtime import device

# What their makers call it, and the GiB that a program can have (nvidia-smi's figure).
CARDS = {"24 GB": 23.6, "40 GB": 39.4, "48 GB": 44.5, "80 GB": 79.1, "141 GB": 139.8}
MOST_GPUS = 64


def describe_fits(architecture: Architecture, layout: Layout, settings: MemorySettings, global_batch_size: int) -> str:
    """`40 GB: 2 GPUs with RECOMPUTE=full; 80 GB: 1 GPU`: for every card the fewest GPUs, more of them as more copies."""
    found = []
    for card, gib in CARDS.items():
        fewest = _fewest_gpus(architecture, layout, settings, global_batch_size, int(gib * GIB))
        if fewest:
            gpus, word = fewest
            again = f" with RECOMPUTE={word}" if word != "none" else ""
            found.append(f"{card}: {gpus} GPU{'s' if gpus > 1 else ''}{again}")
    return "; ".join(found) or f"no card of up to {list(CARDS)[-1]} with up to {MOST_GPUS} GPUs"


def _fewest_gpus(
    architecture: Architecture, layout: Layout, settings: MemorySettings, global_batch_size: int, gpu_bytes: int
) -> tuple[int, str] | None:
    copies = 1
    while copies * layout.model_size <= MOST_GPUS and copies * settings.micro_batch_size <= global_batch_size:
        here = replace(settings, micro_batches=global_batch_size // (copies * settings.micro_batch_size))
        word = settings.recompute
        if word == "auto":
            word = cheapest_recompute(architecture, layout, copies, here, gpu_bytes)
        if estimate(architecture, layout, copies, replace(here, recompute=word)).fits(gpu_bytes):
            return copies * layout.model_size, word
        copies *= 2
    return None


def memory_settings(options: TrainOptions, row_length: int, data_parallel: int) -> MemorySettings:
    """What `estimate` asks for, from the settings of a run."""
    return MemorySettings(
        row_length=row_length,
        micro_batch_size=options.micro_batch_size,
        micro_batches=max(1, options.global_batch_size // (options.micro_batch_size * data_parallel)),
        precision=options.precision,
        recompute=options.recompute,
        optimizer_precision=options.optimizer_precision,
        optimizer_offload=options.optimizer_offload,
    )


def gpu_memory(options: TrainOptions) -> tuple[int, str]:
    """Bytes of a GPU and where that is known from; 0 where it is not."""
    if options.gpu_memory_gib:
        return int(options.gpu_memory_gib * GIB), "GPU_MEMORY_GIB"
    if device.has_gpu():
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory), device.device_name()
    return 0, ""
