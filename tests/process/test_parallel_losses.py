"""Every parallel layout gives the losses of one process; on a machine with GPUs the same bodies run over NCCL."""

import pytest
import torch

from tests.campaigns import parallel_losses
from tests.support import layout_cases
from tests.support.layout_cases import Run, Variant


@pytest.mark.timeout(900)
def test_shared_rows_and_interleaved_stages_give_the_losses_of_one_process() -> None:
    """On CPU, tied embeddings, with rows of one long conversation and rows of conversations shorter than the chunks."""
    names = {"CP2", "PP2 x VPP2", "CP2 x TP2 + SP", "CP2 x PP2", "CP2 x DP2", "CP2 x PP2 x VPP2"}
    layouts = [one for one in (*layout_cases.TWO, *layout_cases.FOUR) if one.name in names]
    assert {one.name for one in layouts} == names
    variants = [Variant("by token", 1e-6), Variant("window, by conversation", 1e-6, model="window", average="conversation")]
    pairs = parallel_losses.compare(variants, layouts, steps=5, on_cpu=True)
    assert len(pairs) == len(names) * len(variants)
    for run, one in pairs:
        _check(run, one)


@pytest.mark.timeout(900)
def test_pairs_give_the_losses_of_one_process_in_every_layout() -> None:
    """On CPU: a layout of every kind with pairs, whose reference's log-probabilities are made in that layout too."""
    names = ["TP2", "PP2", "DP2", "TP2 + SP", "CP2", "PP2 x VPP2", "TP2 x PP2", "CP2 x TP2 + SP"]
    only = {"pairs": names, "pairs, experts": ["EP2"], "pairs, window": ["CP2"], "pairs, adapters": ["TP2 + SP", "CP2 x PP2"]}
    variants = [one for one in layout_cases.ON_CPU if one.name in only]
    layouts = [*layout_cases.TWO, *layout_cases.FOUR]
    pairs = parallel_losses.compare(variants, layouts, steps=4, on_cpu=True, only=only)
    assert len(pairs) == len(names) + 4
    for run, one in pairs:
        _check(run, one)


@pytest.mark.gpu
def test_the_cpu_and_a_gpu_with_and_without_transformer_engine_give_the_same_losses() -> None:
    for run, on_cpu in parallel_losses.compare_devices(steps=10):
        _check(run, on_cpu)


# Every layout with one variant, every other variant in layouts that it has to itself.
ON_TWO_GPUS = {
    "bf16 with TE": [one.name for one in layout_cases.TWO if one.name != "EP2"],
    "bf16": ["TP2 + SP"],
    "fp32": ["CP2"],
    "fp32 with TE": ["TP2 + SP", "PP2 x VPP2"],
    "bf16, window, with TE": ["CP2"],
    "bf16, experts, with TE": ["EP2"],
    "fp32, pairs": ["CP2"],
    "bf16, pairs, with TE": ["TP2 + SP", "CP2"],
}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.timeout(1200)
def test_two_gpus_give_the_losses_of_one() -> None:
    pairs = parallel_losses.compare(layout_cases.ON_GPU, layout_cases.TWO, 10, on_cpu=False, only=ON_TWO_GPUS)
    assert len(pairs) == sum(map(len, ON_TWO_GPUS.values()))
    for run, one in pairs:
        _check(run, one)


@pytest.mark.campaign
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.timeout(1800)
def test_two_gpus_or_four_give_the_losses_of_one_in_every_layout() -> None:
    layouts = parallel_losses.available_layouts(on_cpu=False)
    for run, one in parallel_losses.compare(layout_cases.ON_GPU, layouts, steps=20, on_cpu=False):
        _check(run, one)


def test_only_experts_that_rounding_chooses_excuse_a_difference() -> None:
    one = Run(Variant("experts", 1e-6), layout_cases.ONE, [3.0, 2.0, 1.0], [1.0] * 3, [1e-3, 1e-6, 1e-3], 1.5)

    def run(*losses: float) -> Run:
        return Run(one.variant, layout_cases.TWO[0], list(losses), [1.0] * 3, validation=1.5)

    assert run(3.0, 2.0001, 1.0).difference(one) == 0.0
    assert run(3.0, 2.0, 1.0001).difference(one) == 0.0  # the step after it
    for losses in ((3.0001, 2.0, 1.0), (3.0, 2.1, 1.0), (3.0, 2.0001, 1.1)):
        assert run(*losses).difference(one) > one.variant.tolerance
    decided = Run(one.variant, one.layout, one.losses, one.norms, [1e-3] * 3, one.validation)
    assert run(3.0, 2.0001, 1.0).difference(decided) > one.variant.tolerance


def _check(run: Run, reference: Run) -> None:
    where = f"{run.variant.name}, {run.layout.name}"
    assert run.difference(reference) <= run.variant.tolerance, where
    if run.variant.precision == "fp32":
        assert run.norm_difference(reference) <= 10 * run.variant.tolerance, where
