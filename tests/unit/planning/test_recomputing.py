"""Between no recomputation and that of all layers: what it saves, what it costs, what is chosen, what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron.sft.hf.published_configs import find_architecture
from megatron.sft.model.layout import Layout, share_of_chunk
from megatron.sft.planning.fitting.recomputing import asked_recompute, recompute_problems, with_cheapest_recompute
from megatron.sft.planning.memory import MemorySettings, estimate
from megatron.sft.planning.options import TrainOptions
from megatron.sft.planning.speed.step_time import recompute_cost

ONE, ROW = Layout(), MemorySettings(16384, num_micro_batches=4)
R1_1_5B = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
OPTIONS = TrainOptions(Path(), Path(), Path())


def test_more_recomputation_takes_less_memory_and_the_cheapest_that_fits_is_taken() -> None:
    architecture, _ = find_architecture(R1_1_5B)
    steps = [("none", 0), ("selective", 0), *(("selective", count) for count in range(1, 28)), ("full", 0)]
    asked = [replace(ROW, recompute=word, recompute_layers=count) for word, count in steps]
    sizes = [estimate(architecture, ONE, 1, each).total for each in asked]
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True) and len(set(sizes)) == len(sizes)
    assert abs(sizes[-1] / sizes[-2] - 1) < 0.01  # the last layer's, too: what it keeps is needed at once
    for settings, size in list(zip(asked, sizes, strict=True))[::5]:
        assert with_cheapest_recompute(architecture, ONE, 1, ROW, int(size / 0.96) + 1) == settings
    assert with_cheapest_recompute(architecture, ONE, 1, ROW, 0).recompute == "full"
    costs = [recompute_cost(architecture, ONE, settings) for settings in asked]
    assert costs == sorted(costs) and costs[1] < costs[15] < costs[-1]


def test_layers_recomputed_on_every_stage_and_chunk_lower_what_each_keeps() -> None:
    architecture, _ = find_architecture("Qwen/Qwen2.5-7B-Instruct")
    for layout in (Layout(1, 3), Layout(1, 2, virtual_pipeline=2)):  # stages of 9, 10 and 9 layers; chunks of 7
        most = max(layout.stage_layers(architecture))
        sizes = [
            estimate(architecture, layout, 1, replace(ROW, recompute="selective", recompute_layers=count)).activations
            for count in range(most + 1)
        ]
        full = estimate(architecture, layout, 1, replace(ROW, recompute="full")).activations
        assert sizes == sorted(sizes, reverse=True) and sizes[-1] == full
    assert [share_of_chunk(5, chunk, 3) for chunk in range(3)] == [2, 2, 1]


def test_delayed_scaling_of_fp8_leaves_nothing_to_save_but_whole_layers() -> None:
    architecture, _ = find_architecture(R1_1_5B)
    delayed = replace(ROW, precision="fp8", fp8_recipe="delayed")
    none, selective, one, full = (
        estimate(architecture, ONE, 1, replace(delayed, recompute=word, recompute_layers=count)).total
        for word, count in (("none", 0), ("selective", 0), ("selective", 1), ("full", 0))
    )
    assert none == selective > one > full
    assert with_cheapest_recompute(architecture, ONE, 1, delayed, int(none / 0.96)).recompute_layers == 1
    tensorwise = replace(delayed, fp8_recipe="tensorwise")
    sizes = [estimate(architecture, ONE, 1, replace(tensorwise, recompute=word)).total for word in ("none", "selective")]
    # 8 bits of two norms and of an MLP's inside, a token and layer.
    assert sizes[0] - sizes[1] == pytest.approx(16384 * 28 * (2 * 1536 + 8960), rel=0.05)


@pytest.mark.parametrize(
    ("changes", "layout", "named"),
    [
        ({"recompute_layers": -1}, ONE, "RECOMPUTE_LAYERS is -1"),
        ({"recompute_layers": 3, "recompute": "full"}, ONE, "RECOMPUTE_LAYERS=3 with RECOMPUTE=full"),
        ({"recompute_layers": 3, "recompute": "auto"}, ONE, "RECOMPUTE_LAYERS=3 with RECOMPUTE=auto"),
        ({"recompute_layers": 29}, ONE, "more than the 28 layers that the model has"),
        ({"recompute_layers": 11}, Layout(1, 3), "more than the 10 layers that a pipeline stage has"),
        ({"recompute": "selective", "precision": "fp8", "fp8_recipe": "delayed"}, ONE, "FP8_RECIPE=delayed"),
        ({"recompute_layers": 10}, Layout(1, 3), ""),
        ({"recompute_layers": 3, "recompute": "selective"}, ONE, ""),
        ({"recompute_layers": 3, "precision": "fp8", "fp8_recipe": "delayed"}, ONE, ""),
    ],
)
def test_what_recompute_layers_does_not_go_with_is_named(changes: dict[str, object], layout: Layout, named: str) -> None:
    architecture, _ = find_architecture(R1_1_5B)
    options = replace(OPTIONS, **changes)  # type: ignore[arg-type]
    problems = list(recompute_problems(options, layout, architecture))
    assert (len(problems) == 1 and named in problems[0]) if named else not problems


def test_layers_recomputed_whole_make_the_others_selective() -> None:
    assert asked_recompute(replace(OPTIONS, recompute_layers=2)) == ("selective", 2)
    assert asked_recompute(replace(OPTIONS, recompute="auto")) == ("auto", 0)
