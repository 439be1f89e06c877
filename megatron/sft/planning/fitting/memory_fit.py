"""The fewest GPUs of each usual card that hold a run, and how much memory this machine's GPU has."""

from dataclasses import replace

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.trained import Trained
from megatron.sft.model.layout import Layout
from megatron.sft.planning.fitting.recomputing import asked_recompute, recompute_words, with_cheapest_recompute
from megatron.sft.planning.memory import GIB, MemorySettings, estimate
from megatron.sft.planning.options import TrainOptions
from megatron.sft.runtime import device

# The size on the label, and the GiB that nvidia-smi reports as usable.
CARDS = {"24 GB": 23.6, "40 GB": 39.4, "48 GB": 44.5, "80 GB": 79.1, "141 GB": 139.8}
MOST_GPUS = 64


def fewest_gpus_text(architecture: Architecture, layout: Layout, settings: MemorySettings, global_batch_size: int) -> str:
    """`40 GB: 2 GPUs with RECOMPUTE=full; 80 GB: 1 GPU`: for every card the fewest GPUs, more of them as more data_parallel."""
    found = []
    for card, gib in CARDS.items():
        fewest = _fewest_gpus(architecture, layout, settings, global_batch_size, int(gib * GIB))
        if fewest:
            gpus, chosen = fewest
            again = f" with {recompute_words(chosen)}" if chosen.recompute != "none" else ""
            found.append(f"{card}: {gpus} GPU{'s' if gpus > 1 else ''}{again}")
    batch = f"that share GLOBAL_BATCH_SIZE={global_batch_size} evenly"
    return "; ".join(found) or f"no card of up to {list(CARDS)[-1]} with up to {MOST_GPUS} GPUs {batch}"


def micro_batches(layout: Layout, data_parallel: int, micro_batch_size: int, global_batch_size: int) -> int:
    """Micro-batches of a step on each copy of the model, or 0 where a run with these sizes is refused."""
    number, left = divmod(global_batch_size, data_parallel * micro_batch_size)
    uneven = layout.virtual_pipeline > 1 and number % layout.pipeline_parallel
    return 0 if left or uneven else number


def _fewest_gpus(
    architecture: Architecture, layout: Layout, settings: MemorySettings, global_batch_size: int, gpu_bytes: int
) -> tuple[int, MemorySettings] | None:
    data_parallel = 1
    # Experts are spread over the processes of a pipeline stage.
    while data_parallel * layout.model_size // layout.pipeline_parallel % layout.expert_parallel:
        data_parallel += 1
    while data_parallel * layout.model_size <= MOST_GPUS and data_parallel * settings.micro_batch_size <= global_batch_size:
        number = micro_batches(layout, data_parallel, settings.micro_batch_size, global_batch_size)
        here = replace(settings, num_micro_batches=number)
        if number and settings.recompute == "auto":
            here = with_cheapest_recompute(architecture, layout, data_parallel, here, gpu_bytes)
        if number and estimate(architecture, layout, data_parallel, here).fits(gpu_bytes):
            return data_parallel * layout.model_size, here
        data_parallel *= 2
    return None


def memory_settings(options: TrainOptions, seq_length: int, data_parallel: int, trained: Trained) -> MemorySettings:
    """The argument of `estimate` for a run's settings."""
    recompute, recompute_layers = asked_recompute(options)
    return MemorySettings(
        seq_length=seq_length,
        micro_batch_size=options.micro_batch_size,
        num_micro_batches=max(1, options.global_batch_size // (options.micro_batch_size * data_parallel)),
        precision=options.precision,
        fp8_recipe=options.fp8_recipe,
        recompute=recompute,
        recompute_layers=recompute_layers,
        optimizer_precision=options.optimizer_precision,
        optimizer_offload=options.optimizer_offload,
        trained=trained,
    )


def gpu_memory(options: TrainOptions) -> tuple[int, str]:
    """Bytes of a GPU and the source of that figure; (0, "") where it is not known."""
    if options.gpu_memory_gib:
        return int(options.gpu_memory_gib * GIB), "GPU_MEMORY_GIB"
    if device.has_gpu():
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory), device.device_name()
    return 0, ""
