"""OPTIMIZER_PRECISION=bf16 through the engine: losses next to the float32 optimizer's, layouts, experts, and exact resume."""

import json
from pathlib import Path

import pytest

from tests.support import tiny

STEPS = 8
OPTIONS = ["--precision", "bf16", "--lr", "1e-3", "--min-lr", "1e-4", "--global-batch-size", "4", "--micro-batch-size", "2"]
OPTIONS += ["--train-iters", str(STEPS), "--save-interval", "4", "--clip-grad", "0.3"]
HALF = ["--optimizer-precision", "bf16"]


class Runs:
    """Runs of one model on the same rows, each made once."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.converted = folder / "converted"
        tiny.run_module("convert", "--hf-dir", model, "--output", self.converted, "--dtype", "bf16")
        tiny.write_rows(folder / "rows", tiny.random_rows(32, 64), 64)

    def losses(self, name: str, processes: int, *options: object) -> list[float]:
        run = self.folder / name
        arguments = ["--load", self.converted, "--data-path", self.folder / "rows", "--save", run, *OPTIONS, *options]
        if processes == 1:
            tiny.run_module("train", *arguments)
        else:
            tiny.launch(processes, "train", *arguments)
        return tiny.losses(run)

    def back_to(self, name: str, copy: str, iteration: int) -> None:
        """A copy of a run as it was after `iteration` steps."""
        tiny.as_of(iteration, self.folder / name, self.folder / copy)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("dense")
    runs = Runs(folder, tiny.save_qwen2(folder / "model", tied=True))
    runs.losses("half", 1, *HALF)
    return runs


def close(one: list[float], other: list[float], tolerance: float) -> bool:
    return len(one) == len(other) == STEPS and all(abs(a - b) <= tolerance * a for a, b in zip(one, other, strict=True))


def test_losses_are_those_of_the_float32_optimizer(dense: Runs) -> None:
    assert close(tiny.losses(dense.folder / "half"), dense.losses("whole", 1), 2e-3)


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        pytest.param(2, [], id="DP2"),
        pytest.param(2, ["--tensor-model-parallel-size", 2], id="TP2"),
        pytest.param(2, ["--pipeline-model-parallel-size", 2], id="PP2"),
    ],
)
def test_layouts_give_the_losses_of_one_process(dense: Runs, processes: int, options: list[object]) -> None:
    name = f"half {options}"
    assert close(tiny.losses(dense.folder / "half"), dense.losses(name, processes, *HALF, *options), 2e-3)


def test_a_run_resumes_bit_for_bit_and_in_another_layout(dense: Runs) -> None:
    whole = tiny.losses(dense.folder / "half")
    dense.back_to("half", "again", 4)
    assert dense.losses("again", 1, *HALF) == whole
    manifests = (dense.folder / name / "iter_0000008" / "manifest.json" for name in ("half", "again"))
    first, last = (json.loads(path.read_text()) for path in manifests)
    parts = [name for name in first["files"] if name.endswith(".distcp")]
    assert parts and all(first["files"][name] == last["files"][name] for name in parts)
    dense.back_to("half", "spread", 4)
    assert close(whole, dense.losses("spread", 2, *HALF), 2e-3)


def test_experts_train_and_resume_over_processes(tmp_path: Path) -> None:
    runs = Runs(tmp_path, tiny.save_family(tmp_path / "model", "qwen3_moe"))
    whole = runs.losses("one", 1, *HALF)
    spread = ["--expert-model-parallel-size", 2]
    assert close(whole, runs.losses("EP2", 2, *HALF, *spread), 5e-3)
    runs.back_to("EP2", "back", 4)
    assert close(whole, runs.losses("back", 1, *HALF), 5e-3)


def test_fp32_weights_are_refused_by_name(dense: Runs) -> None:
    arguments = ["--load", dense.converted, "--data-path", dense.folder / "rows", "--save", dense.folder / "refused"]
    output = tiny.run_module("train", *arguments, *OPTIONS, "--precision", "fp32", *HALF, status=2)
    assert "OPTIMIZER_PRECISION=bf16" in output and "PRECISION is fp32" in output
