"""OPTIMIZER_OFFLOAD through the engine: losses next to the float32 optimizer's, shares, layouts, precisions, and exact resume.

On a CPU the copies between GPU and CPU are copies within its memory; the same code makes both, and the same thread steps.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.process.test_optimizer_precision import OPTIONS as OF_RUNS
from tests.process.test_optimizer_precision import STEPS, Runs, close
from tests.support import tiny, tiny_families

OPTIONS = [*OF_RUNS, "--save-interval", "4"]
AWAY, HALF = ["--optimizer-offload", "1"], ["--optimizer-offload", "0.5"]
# The same optimizer with all of its state on the GPU.
HERE = ["--optimizer-offload", "1e-9"]
WORKER = tiny.ROOT / "tests" / "support" / "offload_worker.py"
TENSOR = ["--tensor-model-parallel-size", 2, "--sequence-parallel", 1]
STAGES = ["--pipeline-model-parallel-size", 2]


class Watched(NamedTuple):
    """A run of `offload_worker`: losses, hashes of its last checkpoint's parts, and the report of each process."""

    losses: list[float]
    parts: dict[str, str]
    steps: list[list[dict[str, int]]]


def watched(runs: Runs, name: str, processes: int, *options: object, on_gpu: bool = False, **settings: object) -> Watched:
    run = runs.folder / name
    arguments = ["--load", runs.converted, "--data-path", runs.folder / "rows", "--save", run, *OPTIONS, *options]
    given = json.dumps({"report": str(runs.folder / f"{name}.steps"), **settings})
    if on_gpu:
        tiny.run_on_gpu(processes, str(WORKER), given, *arguments)
    else:
        tiny.launch_test_worker(processes, WORKER, given, *arguments)
    files = json.loads((run / f"iter_{STEPS:07}" / "manifest.json").read_text())["files"]
    reports = [json.loads((runs.folder / f"{name}.steps.{rank}").read_text()) for rank in range(processes or 1)]
    return Watched(tiny.losses(run), {file: files[file] for file in files if file.endswith(".distcp")}, reports)


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


@pytest.mark.parametrize(
    ("processes", "late", "options"),
    [
        pytest.param(1, 0, ["--on-nan", "skip"], id="skipped step"),
        pytest.param(2, 0, [], id="DP2"),
        # What is not split changes after the reduction: norms with their biases; the tied embedding of both stages.
        pytest.param(2, 10, TENSOR, id="TP2"),
        pytest.param(2, 1, STAGES, id="PP2"),
    ],
)
def test_a_slow_cpu_changes_no_bit_and_is_waited_for_layer_by_layer(
    dense: Runs, processes: int, late: int, options: list[object], request: pytest.FixtureRequest
) -> None:
    name, spoil = request.node.callspec.id, 3 if processes == 1 else 0
    here = watched(dense, f"{name} here", processes, *HERE, *options, spoil=spoil)
    away = watched(dense, f"{name} away", processes, *AWAY, *options, spoil=spoil, slow=True)
    assert len(set(away.losses)) == STEPS - (spoil > 0)
    assert (here.losses, here.parts) == (away.losses, away.parts)
    for steps in away.steps:
        for number, step in enumerate(steps[:-1], 1):
            total = step["early"] + step["late"]
            if number == spoil:
                assert step["early"] and not step["late"] and not step["stepped"]
            elif number % 4:
                assert step["late"] == late and step["early"] and 0 < step["stepped"] < total
            else:  # saved after it
                assert step["stepped"] == total


@pytest.mark.gpu
def test_on_a_gpu_what_happens_at_the_same_time_changes_nothing(dense: Runs) -> None:
    def apart(one: Watched, other: Watched) -> float:
        return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))

    for name, share in (("whole", AWAY), ("half", HALF)):
        patient, again = (
            watched(dense, f"{name} {each}", 0, *share, on_gpu=True, patient=True) for each in ("patient", "again")
        )
        slow = watched(dense, f"{name} slow", 0, *share, on_gpu=True, slow=True)
        # Nothing, unless equal runs differ because attention's backward pass adds in changing order.
        assert apart(slow, patient) <= 5 * apart(patient, again), name
        steps = [step for number, step in enumerate(slow.steps[0][:-1], 1) if number % 4]
        assert all(step["early"] and not step["late"] and step["stepped"] < step["early"] for step in steps)


def test_what_the_thread_cannot_do_ends_the_run_with_its_message(dense: Runs) -> None:
    arguments = ["--load", dense.converted, "--data-path", dense.folder / "rows", "--save", dense.folder / "failed", *OPTIONS]
    output = tiny.run(0, str(WORKER), json.dumps({"fail": 2}), *arguments, *AWAY, status=1)
    assert "injected: the CPU cannot step" in output


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


def test_steps_that_overflow_in_fp16_are_said_and_are_the_same_with_offload(dense: Runs) -> None:
    arguments = ["--load", dense.converted, "--data-path", dense.folder / "rows", *OPTIONS, "--precision", "fp16"]
    found = []
    for each in ([], HALF):
        run = dense.folder / f"overflow {each}"
        output = tiny.run_module("train", *arguments, "--save", run, "--initial-loss-scale", 2**22, *each)
        found.append((re.findall("iteration (\\d+): the gradient overflowed.* is (\\S+) now", output), tiny.losses(run)))
    assert found[0][0] == found[1][0] and found[0][0][0][0] == "1"
    assert len(found[0][0]) + len(found[0][1]) == STEPS and found[0][1]
    assert all(abs(a - b) <= 1e-4 * a for a, b in zip(found[0][1], found[1][1], strict=True))


def test_experts_over_processes_are_stepped_in_the_same_order_bit_for_bit(tmp_path: Path) -> None:
    runs = Runs(tmp_path, tiny_families.save_family(tmp_path / "model", "qwen3_moe"))
    spread = ["--expert-model-parallel-size", 2]
    here = watched(runs, "here", 2, *HERE, *spread)
    away = watched(runs, "away", 2, *AWAY, *spread, slow=True)
    assert (here.losses, here.parts) == (away.losses, away.parts)
    assert all(0 < step["stepped"] < step["early"] for steps in away.steps for step in steps[:3])
    assert close(away.losses, runs.losses("one", 1, *AWAY), 5e-3)


def test_what_it_does_not_go_with_is_named(dense: Runs) -> None:
    arguments = ["--load", dense.converted, "--data-path", dense.folder / "rows", "--save", dense.folder / "refused"]
    for options, named in (
        ([*HALF, "--optimizer-precision", "bf16"], "OPTIMIZER_OFFLOAD=0.5 needs OPTIMIZER_PRECISION=fp32"),
        (["--optimizer-offload", "2"], "OPTIMIZER_OFFLOAD: '2' is not a share from 0 to 1"),
    ):
        assert named in tiny.run_module("train", *arguments, "--precision", "bf16", *options, status=2)
    # The plan, too, and whatever else is wrong.
    arguments += ["--optimizer-precision", "8bit", "--precision", "fp32", "--lr", "-1"]
    said = tiny.run_module("plan", *arguments, status=2)
    assert "OPTIMIZER_PRECISION=8bit needs PRECISION=bf16 or fp8, and PRECISION is fp32" in said and "LR=-1" in said
