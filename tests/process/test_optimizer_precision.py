"""OPTIMIZER_PRECISION=bf16 and 8bit through the engine: losses next to the float32 optimizer's, layouts, experts, resume."""

import json
from pathlib import Path

import pytest

from tests.support import tiny, tiny_families

STEPS = 8
OPTIONS = ["--precision", "bf16", "--lr", "1e-3", "--min-lr", "1e-4", "--global-batch-size", "4", "--micro-batch-size", "2"]
OPTIONS += ["--train-iters", str(STEPS), "--save-interval", "2", "--clip-grad", "0.3"]
HALF = ["--optimizer-precision", "bf16"]
CODES = ["--optimizer-precision", "8bit"]


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
    parts = files_of_last(dense, "half")
    assert parts and parts == files_of_last(dense, "again")
    dense.back_to("half", "spread", 4)
    assert close(whole, dense.losses("spread", 2, *HALF), 2e-3)


def test_experts_train_and_resume_over_processes(tmp_path: Path) -> None:
    runs = Runs(tmp_path, tiny_families.save_family(tmp_path / "model", "qwen3_moe"))
    whole = runs.losses("one", 1, *HALF)
    spread = ["--expert-model-parallel-size", 2]
    assert close(whole, runs.losses("EP2", 2, *HALF, *spread), 5e-3)
    runs.back_to("EP2", "back", 4)
    assert close(whole, runs.losses("back", 1, *HALF), 5e-3)


def test_8_bits_stay_near_float32_and_resume_bit_for_bit_and_in_another_layout(dense: Runs) -> None:
    whole = dense.losses("codes", 1, *CODES)
    assert close(tiny.losses(dense.folder / "half"), whole, 1e-2)
    dense.back_to("codes", "codes again", 4)
    assert dense.losses("codes again", 1, *CODES) == whole
    assert files_of_last(dense, "codes") == files_of_last(dense, "codes again")
    # Two stages with a copy each of the tied embedding, and two processes with a share each of every parameter.
    spread = [*CODES, "--pipeline-model-parallel-size", 2]
    dense.back_to("codes", "codes spread", 4)
    assert close(whole, dense.losses("codes spread", 4, *spread), 2e-3)
    dense.back_to("codes spread", "codes spread again", 6)
    assert close(whole, dense.losses("codes spread again", 1, *CODES), 2e-3)


def test_8_bits_continue_a_run_of_16_and_the_other_way_round(dense: Runs) -> None:
    whole = tiny.losses(dense.folder / "half")
    dense.back_to("half", "half, codes", 4)
    assert close(whole, dense.losses("half, codes", 1, *CODES), 1e-2)
    dense.back_to("half, codes", "half, codes, half", 6)
    assert close(whole, dense.losses("half, codes, half", 1, *HALF), 1e-2)


def test_experts_of_8_bits_train_over_processes(tmp_path: Path) -> None:
    runs = Runs(tmp_path, tiny_families.save_family(tmp_path / "model", "qwen3_moe"))
    whole = runs.losses("one", 1, *CODES)
    spread = [*CODES, "--expert-model-parallel-size", 2]
    assert close(whole, runs.losses("EP2", 2, *spread), 5e-3)
    runs.back_to("EP2", "again", 4)
    assert runs.losses("again", 2, *spread) == tiny.losses(tmp_path / "EP2")


def files_of_last(runs: Runs, name: str) -> dict[str, object]:
    """The files of a run's last checkpoint that hold tensors, by their checksums."""
    files = json.loads((runs.folder / name / "iter_0000008" / "manifest.json").read_text())["files"]
    return {part: files[part] for part in files if part.endswith(".distcp")}


@pytest.mark.parametrize("options", [HALF, CODES], ids=["bf16", "8bit"])
def test_fp32_weights_are_refused_by_name(dense: Runs, options: list[str]) -> None:
    arguments = ["--load", dense.converted, "--data-path", dense.folder / "rows", "--save", dense.folder / "refused"]
    output = tiny.run_module("train", *arguments, *OPTIONS, "--precision", "fp32", *options, status=2)
    assert f"OPTIMIZER_PRECISION={options[1]}" in output and "PRECISION is fp32" in output
