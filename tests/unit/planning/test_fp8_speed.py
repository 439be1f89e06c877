"""What `plan` says of fp8, from measured figures, and what refuses a recipe."""

from dataclasses import replace

import pytest

from megatron.sft.hf.published_configs import find_architecture
from megatron.sft.model.config import Machine, fp8_refusal
from megatron.sft.model.layout import Layout
from megatron.sft.planning.speed.fp8_speed import fp8_advice
from tests.support.step_figures import SHAPE

HOPPER = Machine("NVIDIA H100", (9, 0), "13.0", "2.11.0")


@pytest.mark.parametrize(
    "hidden_size, layout, adapters, begins",
    [
        (
            1536,
            Layout(),
            False,
            "FP8_RECIPE=delayed is the fastest measured with 1,536 HERE: at 1,536 tensorwise was 1.15 times",
        ),
        (1536, Layout(2), False, "bf16 is the fastest with 768 HERE: at 768 tensorwise was 0.89 times"),
        (
            1536,
            Layout(1, 1, 2),
            False,
            "bf16 is the fastest with 1,536 HERE and context parallelism: at 1,536 tensorwise was 0.9",
        ),
        (
            3584,
            Layout(1, 1, 2),
            False,
            "not measured with 3,584 HERE and context parallelism: at 1,536 tensorwise was 0.9 times",
        ),
        (2048, Layout(2), False, "not measured with 1,024 HERE: at 1,536 tensorwise was 1.15 times"),
        (3584, Layout(2, 2), False, "FP8_RECIPE=tensorwise is the fastest measured with 1,792 HERE: at 1,792"),
        (8192, Layout(4), False, "FP8_RECIPE=tensorwise is the fastest measured with 2,048 HERE: at 1,792"),
        (5120, Layout(), True, "FP8_RECIPE=tensorwise is the fastest measured with 5,120 HERE: at 3,584"),
        (1536, Layout(), True, "not measured with 1,536 HERE: at 3,584 tensorwise was 1.26 times"),
    ],
)
def test_the_nearest_measured_case_decides(hidden_size: int, layout: Layout, adapters: bool, begins: str) -> None:
    architecture = replace(SHAPE, hidden_size=hidden_size)
    begins = begins.replace("HERE", "hidden units a tensor-parallel process")
    assert fp8_advice(architecture, layout, adapters).startswith(begins)


def test_of_mixtures_it_says_what_is_computed_in_8_bits() -> None:
    architecture, _ = find_architecture("Qwen/Qwen3-30B-A3B")
    advice = fp8_advice(architecture, Layout(), False)
    assert "products PRECISION=fp8 computes in 8 bits on Hopper, tensorwise was 1.04 times as fast as bf16" in advice


@pytest.mark.parametrize(
    "recipe, changes, needs",
    [
        ("tensorwise", {}, ""),
        ("blockwise", {}, ""),
        ("delayed", {"capability": (8, 9)}, ""),
        ("delayed", {"gpu": "NVIDIA A100", "capability": (8, 0)}, "compute capability 8.9, NVIDIA A100 has 8.0: take bf16"),
        ("blockwise", {"gpu": "NVIDIA L40S", "capability": (8, 9)}, "9.0, NVIDIA L40S has 8.9: take FP8_RECIPE=tensorwise"),
        ("blockwise", {"cuda": "12.8"}, "needs CUDA 12.9 or newer, here is 12.8: take FP8_RECIPE=tensorwise"),
        ("blockwise", {"transformer_engine": "2.2.0+abc"}, "needs Transformer Engine 2.3 or newer, here is 2.2.0+abc: take "),
        ("tensorwise", {"cuda": "12.4", "transformer_engine": "1.13"}, ""),
    ],
)
def test_a_recipe_that_the_machine_cannot_compute_is_refused(recipe: str, changes: dict[str, str], needs: str) -> None:
    refusal = fp8_refusal(recipe, Machine(**{**vars(HOPPER), **changes}))
    assert needs in refusal and bool(refusal) == bool(needs)
