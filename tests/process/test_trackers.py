"""TensorBoard, Weights & Biases and the picture of a real run or process."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.sft.reporting import trackers
from megatron.sft.reporting.live_plot import LivePlot
from megatron.sft.reporting.metrics import MetricsLog
from tests.support import tiny
from tests.support.step_figures import RECORD, SHAPE


def points(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, round(event.value, 6)) for event in events.Scalars(name)]


def test_tensorboard_shows_no_step_twice_after_a_resume(train: Callable[..., Path]) -> None:
    """The first run has gone on for two steps after its last checkpoint, which the second one does again."""
    folder = train(1, "--save-interval", 5, "--split", "90,10,0", "--eval-interval", 5)
    time.sleep(1.1)  # TensorBoard orders the files by the second in their names
    writer = trackers.TensorBoard(folder, 11)
    for iteration in (11, 12):
        writer.write({"iteration": iteration, "loss": 9.0})
    writer.close()
    time.sleep(1.1)
    assert [step for step, _ in points(folder, "train/loss")] == list(range(1, 13))
    train(1, "--train-iters", 14, "--split", "90,10,0", "--eval-interval", 5, mode="resume", save=folder)
    expected = [(line["iteration"], line["loss"]) for line in tiny.metrics(folder) if "loss" in line]
    assert points(folder, "train/loss") == [(step, pytest.approx(loss, abs=1e-5)) for step, loss in expected]
    assert [step for step, _ in points(folder, "validation/loss")] == [5, 10, 14]


WANDB = """
import json, os, types
class Settings:
    def __init__(self, **values): self._offline = os.environ.get("WANDB_MODE") == "offline"
class Run:
    step = int(os.environ.get("STAND_IN_STEP", "0"))
    url = "https://example.org/run"
    def __init__(self, id, settings): self.id, self.settings = id, settings
    def log(self, figures, step): record("log", step=step, **figures)
    def finish(self): record("finish")
def record(what, **values):
    with open(os.environ["STAND_IN_LOG"], "a") as file: file.write(json.dumps([what, values]) + chr(10))
def init(project, name, id, resume, dir, config, settings):
    record("init", project=project, name=name, id=id, resume=resume, dir=dir, config=config)
    return Run(id, settings)
"""


def track(folder: Path, iteration: int, **environment: str) -> tuple[str, list[list[object]]]:
    """Three steps through the trackers in a process of its own; what it says, and what the stand-in for wandb was told."""
    program = (
        "import pathlib, sys; from megatron.sft.reporting.trackers import open_trackers\n"
        f"tracked = open_trackers(pathlib.Path({str(folder)!r}), {iteration}, {{'lr': 1.0}})\n"
        f"for step in range({iteration + 1}, {iteration + 4}):\n"
        "    for one in tracked: one.write({'iteration': step, 'loss': 1 / step, 'sources': {'a': {'loss': 2.0}}})\n"
        "for one in tracked: one.close()\n"
    )
    log = folder / "told.jsonl"
    log.unlink(missing_ok=True)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SWANLAB_", "MLFLOW_"))}
    variables |= {"PYTHONPATH": f"{tiny.ROOT}:{os.environ.get('PYTHONPATH', '')}", "STAND_IN_LOG": str(log), **environment}
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return done.stdout + done.stderr, told


def test_weights_and_biases_continues_its_run_and_keeps_the_key_to_itself(tmp_path: Path) -> None:
    (tmp_path / "stand_in").mkdir()
    (tmp_path / "stand_in" / "wandb.py").write_text(WANDB)
    path = f"{tiny.ROOT}:{tmp_path / 'stand_in'}"
    said, told = track(tmp_path, 0, PYTHONPATH=path, WANDB_API_KEY="very-secret")
    [id] = {values["id"] for what, values in told if what == "init"}
    assert [what for what, _ in told] == ["init", "log", "log", "log", "finish"]
    assert told[1][1] == {"step": 1, "train/loss": 1.0, "loss by source/a": 2.0}
    assert f"Weights & Biases: run {id}, https://example.org/run" in said
    # Steps 2 and 3 are there already, and are done again.
    _, told = track(tmp_path, 1, PYTHONPATH=path, WANDB_MODE="offline", STAND_IN_STEP="4")
    assert [values["id"] for what, values in told if what == "init"] == [id]
    assert [values["step"] for what, values in told if what == "log"] == [4]
    files = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert "very-secret" not in said and not any(b"very-secret" in content for content in files)


def test_weights_and_biases_is_not_imported_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text("raise SystemExit('imported')")
    for environment in ({}, {"WANDB_API_KEY": "x", "WANDB_MODE": "disabled"}):
        said, _ = track(tmp_path, 0, PYTHONPATH=f"{tiny.ROOT}:{tmp_path}", **environment)
        assert said == ""


def test_missing_package_and_broken_tracker_are_said_once_and_stop_nothing(tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text("raise ModuleNotFoundError('No module', name='wandb')")
    said, _ = track(tmp_path, 0, PYTHONPATH=f"{tiny.ROOT}:{tmp_path}", WANDB_MODE="offline")
    assert said == "note: Weights & Biases is skipped, the package wandb is missing: pip install wandb\n"
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "tensorboard").write_text("a file where the folder should be")
    said, _ = track(folder, 0)
    assert said.startswith("warning: TensorBoard is disabled (") and len(said.splitlines()) == 1


def test_picture_is_drawn_next_to_the_run_and_its_failure_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tiny.ROOT))
    picture = LivePlot(tmp_path)
    for _ in range(3):
        picture.redraw()  # there is no metrics.jsonl
        picture.close()
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: loss.png is not drawn (error: {tmp_path}/metrics.jsonl does not exist")
    MetricsLog(tmp_path, 100, 80, 0, SHAPE).step(RECORD)
    picture = LivePlot(tmp_path)
    picture.redraw()
    picture.close()
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "loss.png").unlink()
    picture.close()
    assert not (tmp_path / "loss.png").exists(), "it was drawn already"
    MetricsLog(tmp_path, 100, 80, 0, SHAPE).step(RECORD)
    picture.close()
    assert (tmp_path / "loss.png").exists(), "there is more to draw"


SWANLAB = """
import json, os
def record(what, **values):
    with open(os.environ["STAND_IN_LOG"], "a") as file: file.write(json.dumps([what, values]) + chr(10))
def init(project, experiment_name, config, logdir, mode, id=None, resume=None):
    record("init", project=project, name=experiment_name, id=id, resume=resume, mode=mode, config=config)
def log(data, step): record("log", step=step, **data)
def finish(): record("finish")
"""


def test_swanlab_continues_its_experiment_where_it_can(tmp_path: Path) -> None:
    (tmp_path / "stand_in").mkdir()
    (tmp_path / "stand_in" / "swanlab.py").write_text(SWANLAB)
    path = f"{tiny.ROOT}:{tmp_path / 'stand_in'}"
    _, told = track(tmp_path, 0, PYTHONPATH=path, SWANLAB_API_KEY="very-secret")
    _, again = track(tmp_path, 3, PYTHONPATH=path, SWANLAB_API_KEY="very-secret")
    assert [what for what, _ in told] == ["init", "log", "log", "log", "finish"]
    assert told[0][1]["id"] == again[0][1]["id"] and len(told[0][1]["id"]) == 21 and told[0][1]["resume"] == "allow"
    assert told[1][1] == {"step": 1, "train/loss": 1.0, "loss by source/a": 2.0} and again[1][1]["step"] == 4
    _, offline = track(tmp_path, 0, PYTHONPATH=path, SWANLAB_MODE="offline")
    assert offline[0][1]["mode"] == "offline" and offline[0][1]["id"] is None
    assert track(tmp_path, 0, PYTHONPATH=path) == ("", []), "not imported unless asked for"
    assert not any(b"very-secret" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_swanlab_itself_keeps_a_run_in_files(tmp_path: Path) -> None:
    pytest.importorskip("swanlab", reason="needs swanlab")
    said, _ = track(tmp_path, 0, SWANLAB_MODE="offline")
    assert "SwanLab: offline" in said and "warning" not in said
    [kept] = (tmp_path / "swanlog").glob("run-*/*.swanlab")
    assert kept.stat().st_size > 0


def test_mlflow_gets_every_step_once(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="needs mlflow-skinny")
    store = {"MLFLOW_TRACKING_URI": f"file:{tmp_path / 'store'}", "MLFLOW_ALLOW_FILE_STORE": "true"}
    said, _ = track(tmp_path, 0, **store)
    again, _ = track(tmp_path, 1, **store)  # steps 2 and 3 are done again
    [losses] = (tmp_path / "store").rglob("metrics/train/loss")
    lines = [line.split() for line in losses.read_text().splitlines()]
    assert [(int(step), float(loss)) for _, loss, step in lines] == [(1, 1.0), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4)]
    assert said.splitlines()[0] == again.splitlines()[0] and said.startswith("MLflow: run ")
