"""Step times next to measured ones (docs/performance.md), and what follows from a layout alone."""

from dataclasses import replace

import pytest

from megatron.sft.families.architecture import Architecture
from megatron.sft.hf.published_configs import find_architecture
from megatron.sft.model.layout import Layout
from megatron.sft.planning.memory import MemorySettings
from megatron.sft.planning.speed.run_time import RowLoad
from megatron.sft.planning.speed.step_time import Cluster, StepTime, step_time

SMALL, LARGER, DELTA, MIXTURE = (
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen3.5-4B",
    "Qwen/Qwen3-30B-A3B",
)
TP2, PP2 = Layout(2, sequence_parallel=True), Layout(1, 2)
LESS = {"recompute": "selective", "optimizer_precision": "bf16"}


def load(length: int) -> RowLoad:
    """The benchmark's rows."""
    lengths = [size * length // 16384 for size in (5200, 4100, 3000, 2100, 1200, 784)]
    return RowLoad(sum(lengths), sum(lengths), sum(size * size for size in lengths))


def time_of(name: str, layout: Layout, copies: int, length: int = 16384, count: int = 4, **settings: object) -> StepTime:
    asked = MemorySettings(length, num_micro_batches=count, **settings)  # type: ignore[arg-type]
    return step_time(cut(name), layout, copies, asked, load(length))


def cut(name: str) -> Architecture:
    architecture, _ = find_architecture(name)
    return replace(architecture, layers=architecture.layers[:4], num_layers=4) if name == MIXTURE else architecture


@pytest.mark.parametrize(
    ("name", "layout", "copies", "length", "count", "settings", "tokens_per_second"),
    [
        (SMALL, Layout(), 1, 16384, 4, {}, 52_444),
        (SMALL, Layout(), 2, 16384, 4, {}, 104_285),
        (SMALL, TP2, 1, 16384, 4, {}, 84_518),
        (SMALL, Layout(1, 1, 2), 1, 16384, 4, {}, 89_252),
        (SMALL, PP2, 1, 16384, 4, {}, 80_704),
        (SMALL, Layout(2, 2, sequence_parallel=True), 1, 16384, 4, {}, 122_213),
        (SMALL, Layout(), 1, 16384, 4, LESS, 50_460),
        (SMALL, Layout(), 1, 16384, 4, {"recompute": "full"}, 40_480),
        (SMALL, Layout(), 1, 8192, 4, {}, 52_831),
        (SMALL, Layout(), 1, 16384, 4, {"precision": "fp8"}, 63_296),
        (LARGER, TP2, 1, 8192, 2, LESS, 23_129),
        (LARGER, TP2, 1, 16384, 2, LESS, 23_814),
        (LARGER, TP2, 1, 8192, 2, {**LESS, "precision": "fp8"}, 29_925),
        (DELTA, Layout(), 1, 16384, 2, LESS, 17_549),
        (MIXTURE, Layout(), 1, 16384, 4, LESS, 117_267),
        (SMALL, Layout(), 1, 16384, 16, {"recompute": "selective"}, 51_106),
        (SMALL, Layout(), 1, 16384, 16, {"recompute": "selective", "optimizer_offload": 0.5}, 46_974),
        (SMALL, Layout(), 1, 16384, 16, {"recompute": "selective", "optimizer_offload": 1.0}, 42_914),
        (MIXTURE, Layout(), 1, 16384, 4, {**LESS, "precision": "fp8"}, 127_152),
        (MIXTURE, Layout(expert_parallel=2), 2, 16384, 4, LESS, 207_428),
    ],
)
def test_estimates_are_within_6_percent_of_measured_steps(
    name: str, layout: Layout, copies: int, length: int, count: int, settings: dict[str, object], tokens_per_second: float
) -> None:
    found = time_of(name, layout, copies, length, count, **settings)
    measured = count * copies * load(length).tokens / tokens_per_second
    assert abs(found.total / measured - 1) <= 0.06


@pytest.mark.parametrize(
    ("layout", "copies", "tokens_per_second"),
    [(PP2, 1, 88_165), (Layout(), 2, 118_274), (TP2, 1, 70_474), (Layout(1, 1, 2), 1, 67_303)],
)
def test_estimates_of_fp8_over_two_gpus_are_within_9_percent(layout: Layout, copies: int, tokens_per_second: float) -> None:
    measured = 4 * copies * load(16384).tokens / tokens_per_second
    assert abs(time_of(SMALL, layout, copies, precision="fp8").total / measured - 1) <= 0.09


def test_the_processor_is_the_limit_of_short_passes_which_more_rows_a_pass_lift() -> None:
    short, wide = (time_of(SMALL, TP2, 1, count=4 // rows, precision="fp8", micro_batch_size=rows) for rows in (1, 2))
    assert short.launching > 0.2 * short.total and wide.launching < 0.01 * wide.total
    # The same kernels, however little each has to do.
    shorter = time_of(SMALL, TP2, 1, 4096, precision="fp8")
    assert shorter.total - shorter.optimizer == pytest.approx(short.total - short.optimizer, rel=0.05)
    assert time_of(SMALL, Layout(), 1).launching == 0


def test_two_of_three_products_of_experts_gain_by_fp8_and_their_weights_are_cast_in_each_step() -> None:
    long, short = (
        {word: time_of(MIXTURE, Layout(), 1, count=count, precision=word, **lora) for word in ("bf16", "fp8")}
        for count, lora in ((4, {}), (1, {}))
    )
    # 65,536 tokens, 8 experts each, 4 layers, three products of three matrices of 2,048 x 768.
    products = 65536 * 8 * 4 * 3 * 3 * 2 * 2048 * 768
    assert products / 680e12 * 0.1 < long["bf16"].compute - long["fp8"].compute < products / 560e12 * 0.5
    casts = long["fp8"].optimizer - long["bf16"].optimizer
    assert casts > 0 and casts == pytest.approx(short["fp8"].optimizer - short["bf16"].optimizer)


def test_more_micro_batches_and_chunks_of_stages_shrink_the_share_of_waiting_stages() -> None:
    few, many = (time_of(SMALL, Layout(1, 4), 1, count=count) for count in (4, 16))
    chunks = time_of(SMALL, Layout(1, 4, virtual_pipeline=7), 1)
    assert few.bubble / few.total > 2 * many.bubble / many.total
    assert chunks.bubble == pytest.approx(few.bubble / 7, rel=0.1)  # stages send more often


def test_tensor_parallelism_over_hosts_is_slower_than_within_one() -> None:
    settings = MemorySettings(16384, num_micro_batches=4)
    architecture, _ = find_architecture(LARGER)
    within, over = (
        step_time(architecture, Layout(4, sequence_parallel=True), 1, settings, load(16384), Cluster(size)) for size in (8, 2)
    )
    assert over.tensor > 3 * within.tensor and over.compute == within.compute


def test_an_optimizer_in_cpu_memory_costs_what_the_first_forward_pass_does_not_hide() -> None:
    here, half, away = (time_of(SMALL, Layout(), 1, count=16, optimizer_offload=share) for share in (0.0, 0.5, 1.0))
    assert here.offload == away.optimizer == 0 < half.optimizer < here.optimizer
    assert 0 < half.offload < away.offload / 2 and 1.15 * here.total < away.total < 1.25 * here.total
    # The same seconds, of a step that is four times as short.
    assert time_of(SMALL, Layout(), 1, optimizer_offload=1.0).offload == away.offload
    # Two copies share the optimizer, and longer rows hide it.
    assert time_of(SMALL, Layout(), 2, count=16, optimizer_offload=1.0).offload < away.offload / 2
    assert time_of(SMALL, Layout(), 1, 65536, optimizer_offload=0.25).offload == 0
