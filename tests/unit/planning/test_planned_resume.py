"""`plan` of a saved run says what `resume` would refuse or report of its settings."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.sft.checkpoint.folder import open_checkpoint
from megatron.sft.plan import compare_with_saved
from megatron.sft.planning.options import TrainOptions, options_record
from megatron.sft.planning.resolution import Resolution, plan_run, resolve
from megatron.sft.runtime.manifest import sealed
from megatron.sft.training.same_run import data_record


@pytest.fixture
def saved(converted: Path, packed_rows: Path, tmp_path: Path) -> TrainOptions:
    """The settings of a run whose first step is saved, as far as its manifest goes."""
    options = TrainOptions(load=converted, data_path=packed_rows, save=tmp_path / "run", global_batch_size=2, train_iters=4)
    training = {"options": options_record(options), "data": data_record(plan_run("train", options, 1)), "num_processes": 1}
    shutil.copytree(converted, options.save)
    path = open_checkpoint(options.save).path / "manifest.json"
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | {"training": training | {"train_iters": 4}})))
    return options


def planned(options: TrainOptions) -> Resolution:
    found = resolve("", options, 1)
    assert found.resume
    compare_with_saved(found)
    return found


def test_a_plan_finds_what_resuming_refuses_and_names_what_it_reports(saved: TrainOptions) -> None:
    assert not planned(saved).problems
    (problem,) = planned(replace(saved, seed=7)).problems
    assert "SEED" in problem and "RESUME_WITH=seed" in problem
    (problem,) = planned(replace(saved, resume_with="lr")).problems
    assert "RESUME_WITH='lr'" in problem
    found = planned(replace(saved, lr=1e-3, global_batch_size=4, resume_with="global_batch_size", train_iters=8))
    changed = [value for name, value in found.lines if name == "changed"]
    assert not found.problems
    assert changed == ["GLOBAL_BATCH_SIZE from 2 to 4", "LR from 1e-05 to 0.001", "the number of steps from 4 to 8"]


def test_a_plan_finds_a_checkpoint_that_is_not_a_runs(converted: Path, packed_rows: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, tmp_path / "run")
    options = TrainOptions(load=converted, data_path=packed_rows, save=tmp_path / "run", global_batch_size=2, train_iters=4)
    (problem,) = planned(options).problems
    assert "no training state" in problem
