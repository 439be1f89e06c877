"""The other supported version of megatron-core: 0.19.2 where this Python gets 0.16.1, and the other way round."""

import importlib.metadata
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.support import fork_server, tiny, tiny_families
from tests.support.other_core import VERSIONS, other_core

pytestmark = pytest.mark.slow
PP2 = "--pipeline-model-parallel-size 2"
LAYOUTS = {
    "TP2 + SP": ("qwen2", 2, "--tensor-model-parallel-size 2 --sequence-parallel 1"),
    "PP2": ("qwen2", 2, PP2),
    "EP2": ("qwen3_moe", 2, "--expert-model-parallel-size 2"),
    "norms over projections, TP2": ("olmo3", 2, "--tensor-model-parallel-size 2"),
    "gated delta nets, TP2 + SP": ("qwen3_5", 2, "--tensor-model-parallel-size 2 --sequence-parallel 1"),
    "CP2": ("qwen2", 2, "--context-parallel-size 2"),
    "TP2 x PP2 x VPP2": ("qwen2_4_layers", 4, f"{PP2} --tensor-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "DP2, moments of 8 bits": ("llama3", 2, "--optimizer-precision 8bit"),
    "DP2, adapters": ("qwen2", 2, "--lora-rank 4 --lr 1e-2"),
}
IN_CI = ("TP2 + SP",)


def test_the_version_is_one_of_two() -> None:
    assert importlib.metadata.version("megatron-core") in VERSIONS
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT)}
    program = "from megatron.sft.runtime import device; device.prepare(); import megatron.core as core"
    program += "; print(core.__version__.partition('+')[0])"
    versions = [
        subprocess.run([python, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout.strip()
        for python in (sys.executable, str(other_core()))
    ]
    assert sorted(versions) == list(VERSIONS)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "tests",
    [
        ["unit/test_seams.py", "process/test_conversion.py::test_megatron_cores_own_loader_reads_a_converted_checkpoint"],
        pytest.param(["process/test_quickstart.py"], marks=pytest.mark.campaign),
    ],
    ids=["seams and a conversion", "the quickstart"],
)
def test_tests_pass_on_the_other_version(tests: list[str]) -> None:
    command = [str(other_core()), "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in tests)]
    done = subprocess.run(command, cwd=tiny.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize(
    "layout", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.campaign) for name in LAYOUTS]
)
def test_losses_are_the_same_and_either_continues_what_the_other_saved(
    layout: str, packed_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, processes, sizes = LAYOUTS[layout]
    source = tiny_families.save_family(tmp_path / "model", family)
    tiny.run_module("convert", "--hf-dir", source, "--output", tmp_path / "checkpoint")
    options = ["--load", tmp_path / "checkpoint", "--data-path", packed_rows, "--precision", "fp32", "--lr", "1e-3"]
    options += ["--train-iters", "6", "--save-interval", "3", "--global-batch-size", "8", *sizes.split()]

    def train(folder: Path, python: str) -> list[float]:
        given = [*map(str, options), "--save", str(folder)]
        monkeypatch.setattr(sys, "executable", python)
        status, output = tiny.start(processes, "megatron.sft.train", given, fork_server.environment_of_runs(), 200)
        monkeypatch.undo()
        assert status == 0, output[-4000:]
        return tiny.losses(folder)

    ours, theirs = sys.executable, str(other_core())
    losses = train(tmp_path / "ours", ours)
    same = partial(pytest.approx, abs=1e-6, rel=0)
    assert train(tmp_path / "theirs", theirs) == same(losses)
    for saved_by, continued_by in (("ours", theirs), ("theirs", ours)):
        halves = tiny.as_of(3, tmp_path / saved_by, tmp_path / f"of {saved_by}")
        assert train(halves, continued_by) == same(losses)
        assert (halves / "iter_0000006").is_dir()
    # The other version converts and exports as this one does.
    exports = [tmp_path / "exported by ours", tmp_path / "exported by theirs"]
    tiny.run_module("export", "--load", tmp_path / "theirs", "--hf-dir", source, "--output", exports[0])
    monkeypatch.setattr(sys, "executable", theirs)
    for module, given in (
        ("export", ["--load", tmp_path / "theirs", "--hf-dir", source, "--output", exports[1]]),
        ("convert", ["--hf-dir", source, "--output", tmp_path / "converted"]),
        ("export", ["--load", tmp_path / "converted", "--hf-dir", source, "--output", tmp_path / "source"]),
    ):
        words = list(map(str, given))
        status, output = tiny.start(0, f"megatron.sft.{module}", words, fork_server.environment_of_runs(), 200)
        assert status == 0, output[-4000:]
    tiny.assert_same_weights(*exports)
    tiny.assert_same_weights(tmp_path / "source", source)
