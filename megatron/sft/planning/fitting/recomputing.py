"""What a run computes again to save memory: the cheapest that fits, and its words."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace

from megatron.sft.families.architecture import Architecture
from megatron.sft.model.layout import Layout
from megatron.sft.planning.memory import MemorySettings, estimate
from megatron.sft.planning.options import TrainOptions


def with_cheapest_recompute(
    architecture: Architecture, layout: Layout, data_parallel: int, settings: MemorySettings, gpu_bytes: int
) -> MemorySettings:
    """The settings with the recomputation that costs least time and fits `gpu_bytes`; of everything where none fits."""

    def asked(word: str, num_layers: int = 0) -> MemorySettings:
        return replace(settings, recompute=word, recompute_layers=num_layers)

    def fits(word: str, num_layers: int = 0) -> bool:
        return estimate(architecture, layout, data_parallel, asked(word, num_layers)).fits(gpu_bytes)

    for word in ("none", *(["selective"] if _saves_selectively(settings.precision, settings.fp8_recipe) else [])):
        if fits(word):
            return asked(word)
    counts = range(1, max(layout.stage_layers(architecture)))
    index = bisect_left(counts, True, key=lambda count: fits("selective", count))
    return asked("selective", counts[index]) if index < len(counts) else asked("full")


def recompute_words(settings: MemorySettings) -> str:
    """As in a shell: `RECOMPUTE=full`, or `RECOMPUTE_LAYERS=7`."""
    return f"RECOMPUTE_LAYERS={settings.recompute_layers}" if settings.recompute_layers else f"RECOMPUTE={settings.recompute}"


def asked_recompute(options: TrainOptions) -> tuple[str, int]:
    """RECOMPUTE and RECOMPUTE_LAYERS as they are meant: with some layers recomputed whole, the others are selectively."""
    return ("selective" if options.recompute_layers else options.recompute), options.recompute_layers


def recompute_problems(options: TrainOptions, layout: Layout, architecture: Architecture | None) -> Iterator[str]:
    """What is wrong with RECOMPUTE and RECOMPUTE_LAYERS."""
    word, count = options.recompute, options.recompute_layers
    if count < 0:
        yield f"RECOMPUTE_LAYERS is {count}: it must be 0 or more"
    elif count and word == "full":
        yield f"RECOMPUTE_LAYERS={count} with RECOMPUTE=full, which recomputes all: set RECOMPUTE=selective, or unset one"
    elif count and word == "auto":
        yield f"RECOMPUTE_LAYERS={count} with RECOMPUTE=auto, which chooses that number: set RECOMPUTE=selective, or unset one"
    elif count and architecture and layout.pipeline_parallel <= architecture.num_layers:
        most = max(layout.stage_layers(architecture))
        if count > most:
            where = "a pipeline stage has" if layout.pipeline_parallel > 1 else "the model has"
            yield f"RECOMPUTE_LAYERS={count} is more than the {most} layers that {where}: take RECOMPUTE=full for all of them"
    if word == "selective" and not count and not _saves_selectively(options.precision, options.fp8_recipe):
        yield (
            "RECOMPUTE=selective saves nothing with FP8_RECIPE=delayed, whose layers keep 8-bit inputs: take RECOMPUTE=full, "
            "RECOMPUTE_LAYERS, or FP8_RECIPE=tensorwise"
        )


def _saves_selectively(precision: str, fp8_recipe: str) -> bool:
    return not (precision == "fp8" and fp8_recipe == "delayed")
