"""Saving: what is kept, what goes on with other settings, and what happens when a checkpoint cannot be written."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.sft.checkpoint.folder import TRACKER
from tests.support import tiny, tiny_families
from tests.support.layout_worker import stored_tensors

MODES = {"while training goes on": "1", "while training waits": "0"}


@pytest.fixture(scope="module")
def half(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 steps as it was after 5."""
    return tiny.as_of(5, train(1, "--save-interval", "5"), tmp_path_factory.mktemp("half") / "run")


def test_a_run_removes_checkpoints_and_saves_the_same_state_in_both_ways(train: Callable[..., Path], tmp_path: Path) -> None:
    options = ["--save-interval", "1", "--keep-last", "2", "--keep-every", "4"]
    runs = [train(2, *options, "--async-save", flag) for flag in MODES.values()]
    for run in runs:
        assert sorted(p.name for p in run.glob("iter_*")) == [f"iter_{n:07d}" for n in (4, 8, 9, 10)]
        assert not [p.name for p in run.iterdir() if p.name.startswith(".iter")]
    one, other = (stored_tensors(run / "iter_0000010") for run in runs)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_torch_reads_a_checkpoint_whose_optimizer_state_is_spread(train: Callable[..., Path], tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    run = train(2, "--train-iters", "2")
    dcp_to_torch_save(run / "iter_0000002", tmp_path / "whole.pt")
    theirs = torch.load(tmp_path / "whole.pt", weights_only=True)
    ours = stored_tensors(run / "iter_0000002")
    assert len(ours) > 20 and all(torch.equal(theirs[key], tensor) for key, tensor in ours.items())


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_last_one(
    half: Path, converted: Path, packed_rows: Path, tmp_path: Path, mode: str
) -> None:
    """No file may grow beyond 100 kB, which the system enforces."""
    run = tmp_path / "run"
    shutil.copytree(half, run)
    options = ["--load", converted, "--data-path", packed_rows, "--save", run, "--precision", "fp32", "--lr", "1e-3"]
    options += ["--min-lr", "1e-4", "--train-iters", "10", "--global-batch-size", "8", "--micro-batch-size", "2"]
    options += ["--save-interval", "2", "--async-save", MODES[mode]]
    command = [sys.executable, "-m", "megatron.sft.train", "resume", *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MEGATRON_SFT_DEVICE": "cpu"}

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = subprocess.run(
        command, env=environment, cwd=tiny.ROOT, text=True, capture_output=True, timeout=240, preexec_fn=no_large_files
    )
    assert result.returncode == 2, result.stderr[-3000:]
    assert "error: the checkpoint of iteration 6 was not written: [Errno 27] File too large" in result.stderr
    assert "iteration 5 is kept" in result.stderr
    assert [p.name for p in run.iterdir() if "iter_" in p.name] == ["iter_0000005"]
    assert (run / TRACKER).read_text() == "5"


def test_a_writer_that_ends_silently_ends_the_run(converted: Path, packed_rows: Path, tmp_path: Path) -> None:
    options = ["--load", converted, "--data-path", packed_rows, "--save", tmp_path / "run", "--train-iters", "4"]
    script = tiny.ROOT / "tests" / "support" / "silent_writer.py"
    options += ["--precision", "fp32", "--global-batch-size", "8", "--save-interval", "2"]
    output = tiny.launch_test_worker(2, script, *options, status=2)
    assert "the checkpoint of iteration 2 was not written: rank 1: the thread that wrote it ended" in output
    assert not list((tmp_path / "run").glob("*iter_*"))


def test_a_change_of_the_run_is_refused_with_both_values_or_taken_on_an_explicit_word(
    half: Path, converted: Path, packed_rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(half, run)
    other = tiny.write_rows(tmp_path / "other", tiny.random_rows(64, 128, seed=1), 128)
    common = ["resume", "--load", converted, "--save", run, "--precision", "fp32", "--train-iters", "6"]
    same = ["--data-path", packed_rows, "--global-batch-size", "8"]
    output = tiny.run_module("train", *common, *same, "--seed", "7", status=2)
    assert "SEED was 1234 in" in output and "is 7 now" in output and "RESUME_WITH=seed" in output
    output = tiny.run_module("train", *common, *same, "--seed", "7", "--resume-with", "data", status=2)
    assert "SEED was 1234 in" in output
    output = tiny.run_module("train", *common, *same, "--resume-with", "everything", status=2)
    assert "RESUME_WITH='everything': 'everything' is not one of data, tokenizer" in output
    output = tiny.run_module("train", *common, "--data-path", other, "--global-batch-size", "8", status=2)
    assert "DATA_PATH's content was checksum" in output
    changed = ["--data-path", other, "--global-batch-size", "4", "--micro-batch-size", "2"]
    output = tiny.run_module("train", *common, *changed, "--resume-with", "data,global-batch-size")
    assert "changed since iteration 5: GLOBAL_BATCH_SIZE from 8 to 4" in output
    assert [line["consumed_rows"] for line in tiny.metrics(run)][-2:] == [40, 44]


def test_experts_spread_over_processes_continue_in_one_and_back(packed_rows: Path, tmp_path: Path) -> None:
    model = tiny_families.save_family(tmp_path / "model", "qwen3_moe")
    tiny.run_module("convert", "--hf-dir", model, "--output", tmp_path / "converted")
    options = ["--load", tmp_path / "converted", "--data-path", packed_rows, "--precision", "fp32", "--lr", "1e-3"]
    options += ["--train-iters", "6", "--global-batch-size", "8", "--save-interval", "3"]
    ways = {"one": (1, []), "spread": (2, ["--expert-model-parallel-size", "2"])}
    for way, (processes, parallel) in ways.items():
        tiny.launch(processes, "train", "train", *options, *parallel, "--save", tmp_path / way)
    for way, (processes, parallel) in ways.items():
        source = tmp_path / ("spread" if way == "one" else "one")
        run = tiny.as_of(3, source, tmp_path / f"{source.name} to {way}")
        tiny.launch(processes, "train", "resume", *options, *parallel, "--save", run)
        assert tiny.losses(run) == pytest.approx(tiny.losses(source), abs=1e-5)
        saved, resumed = (stored_tensors(folder / "iter_0000006") for folder in (source, run))
        for key, tensor in saved.items():
            assert torch.allclose(tensor, resumed[key], atol=1e-5), key


def test_the_loss_scale_of_fp16_continues(train: Callable[..., Path], tmp_path: Path) -> None:
    """Doubled after every two good steps, so that a count that was forgotten would show."""
    options = ["--precision", "fp16", "--save-interval", "5", "--initial-loss-scale", "256", "--loss-scale-window", "2"]
    run = train(1, *options)
    halved = tiny.as_of(5, run, tmp_path / "halved")
    train(1, *options, mode="resume", save=halved)
    scales = [line["loss_scale"] for line in tiny.metrics(run) if "loss" in line]
    assert len(set(scales)) == 6 and [line["loss_scale"] for line in tiny.metrics(halved)] == scales
    assert tiny.losses(halved) == tiny.losses(run)
