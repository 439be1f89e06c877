"""OPTIMIZER_OFFLOAD through the engine: losses next to the float32 optimizer's, shares, layouts, precisions, and exact resume.

On a CPU the copies between GPU and CPU are copies within its memory; the same code makes both.
"""

from pathlib import Path

import pytest

from tests.process.test_optimizer_precision import STEPS, Runs, close
from tests.support import tiny

AWAY, HALF = ["--optimizer-offload", "1"], ["--optimizer-offload", "0.5"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("dense")
    runs = Runs(folder, tiny.save_qwen2(folder / "model", tied=True))
    runs.losses("away", 1, *AWAY)
    return runs


def test_losses_are_those_of_the_optimizer_on_the_gpu_and_equal_for_every_share(dense: Runs) -> None:
    away = tiny.losses(dense.folder / "away")
    assert len(set(away)) == STEPS and close(away, dense.losses("here", 1), 1e-5)
    assert dense.losses("half", 1, *HALF) == away


@pytest.mark.parametrize("options", [[], ["--tensor-model-parallel-size", 2], ["--pipeline-model-parallel-size", 2]])
def test_layouts_give_the_losses_of_one_process(dense: Runs, options: list[object]) -> None:
    assert close(tiny.losses(dense.folder / "away"), dense.losses(f"away {options}", 2, *HALF, *options), 2e-3)


def test_a_run_resumes_bit_for_bit_with_any_share_and_without(dense: Runs) -> None:
    whole = tiny.losses(dense.folder / "away")
    for name, options in (("again", AWAY), ("by halves", HALF)):
        dense.back_to("away", name, 4)
        assert dense.losses(name, 1, *options) == whole
    dense.back_to("away", "back", 4)
    assert close(whole, dense.losses("back", 1), 1e-5)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_other_precisions_take_it(dense: Runs, precision: str) -> None:
    away, here = (dense.losses(f"{precision} {each}", 1, "--precision", precision, *each) for each in (HALF, []))
    assert close(away, here, 1e-4)


def test_experts_are_taken_away_over_processes(tmp_path: Path) -> None:
    runs = Runs(tmp_path, tiny.save_family(tmp_path / "model", "qwen3_moe"))
    whole = runs.losses("one", 1, *AWAY)
    assert close(whole, runs.losses("EP2", 2, *HALF, "--expert-model-parallel-size", 2), 5e-3)


def test_what_it_does_not_go_with_is_named(dense: Runs) -> None:
    arguments = ["--load", dense.converted, "--data-path", dense.folder / "rows", "--save", dense.folder / "refused"]
    for options, named in (
        ([*HALF, "--optimizer-precision", "bf16"], "OPTIMIZER_OFFLOAD=0.5 needs OPTIMIZER_PRECISION=fp32"),
        (["--optimizer-offload", "2"], "OPTIMIZER_OFFLOAD: '2' is not a share from 0 to 1"),
    ):
        assert named in tiny.run_module("train", *arguments, "--precision", "bf16", *options, status=2)
