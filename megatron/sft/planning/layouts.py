"""Parallel sizes for a model on given GPUs: which of them fit, estimated fastest first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron.sft.families.architecture import Architecture
from megatron.sft.model.layout import Layout, check_layout
from megatron.sft.planning.fitting.recomputing import with_cheapest_recompute
from megatron.sft.planning.memory import MemorySettings, estimate
from megatron.sft.planning.memory_phases import MemoryEstimate
from megatron.sft.planning.speed.run_time import full_rows
from megatron.sft.planning.speed.step_time import StepTime, step_time
from megatron.sft.runtime.errors import UserError


@dataclass(frozen=True)
class Suggestion:
    """Parallel sizes that fit, the memory they take, and the estimated time of a step of full rows."""

    layout: Layout
    data_parallel: int
    settings: MemorySettings  # with the recomputation that was chosen
    memory: MemoryEstimate
    time: StepTime


def suggest_layouts(
    architecture: Architecture, num_gpus: int, gpu_bytes: int, settings: MemorySettings, global_batch_size: int, count: int = 5
) -> list[Suggestion]:
    """The parallel sizes for `num_gpus` GPUs that fit `gpu_bytes` each, estimated fastest first.

    `settings.recompute` and `.num_micro_batches` are chosen here. Sequence parallelism goes with TP above 1.
    """
    suggestions = []
    for layout in _layouts(architecture, num_gpus, settings):
        data_parallel = num_gpus // layout.model_size
        if global_batch_size % (data_parallel * settings.micro_batch_size):
            continue
        here = replace(settings, num_micro_batches=global_batch_size // (data_parallel * settings.micro_batch_size))
        here = with_cheapest_recompute(architecture, layout, data_parallel, here, gpu_bytes)
        memory = estimate(architecture, layout, data_parallel, here)
        if memory.fits(gpu_bytes):
            time = step_time(architecture, layout, data_parallel, here, full_rows(settings.seq_length))
            suggestions.append(Suggestion(layout, data_parallel, here, memory, time))
    suggestions.sort(key=lambda suggestion: (suggestion.time.total, suggestion.memory.total))
    return suggestions[:count]


def largest_parts(
    architecture: Architecture, num_gpus: int, settings: MemorySettings, global_batch_size: int
) -> tuple[int, list[tuple[str, int]]]:
    """The least that any layout on `num_gpus` GPUs takes of each, and its parts, the largest first."""
    least: MemoryEstimate | None = None
    for layout in _layouts(architecture, num_gpus, settings):
        data_parallel = num_gpus // layout.model_size
        num_micro_batches = max(1, global_batch_size // (data_parallel * settings.micro_batch_size))
        here = replace(settings, num_micro_batches=num_micro_batches, recompute="full")
        found = estimate(architecture, layout, data_parallel, here)
        least = found if least is None or found.total < least.total else least
    if least is None:
        return 0, []
    return least.total, sorted(least.parts().items(), key=lambda part: -part[1])


def _layouts(architecture: Architecture, num_gpus: int, settings: MemorySettings) -> Iterator[Layout]:
    context_sizes = (1, 2, 4, 8)
    expert_sizes = (1, 2, 4, 8) if architecture.moe else (1,)
    for tensor in (1, 2, 4, 8):
        for pipeline in (1, 2, 4, 8, 16):
            for context in context_sizes:
                for expert in expert_sizes:
                    layout = Layout(tensor, pipeline, context, tensor > 1, expert)
                    if num_gpus % layout.model_size or context * 4096 > max(4096, settings.seq_length):
                        continue  # shorter parts of a row are not worth the communication
                    try:
                        check_layout(layout, architecture)
                        layout.data_parallel(num_gpus)
                    except UserError:
                        continue
                    yield layout
