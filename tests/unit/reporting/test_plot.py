"""The loss curve: what is read from metrics.jsonl, and that a readable PNG comes out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.sft.reporting.curves import read_curve, run_names
from megatron.sft.reporting.loss_plot import draw, smoothed, title_of
from megatron.sft.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def write_metrics(folder: Path, num_steps: int = 50) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"iteration": step, "loss": 5.0 / step, "lr": 1e-3} for step in range(1, num_steps + 1)]
    lines.insert(20, {"iteration": 20, "validation_loss": 0.3})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_training_and_validation_lines_are_told_apart(tmp_path):
    curve = read_curve(write_metrics(tmp_path / "run", 30), "run")
    assert (curve.iterations[0], curve.iterations[-1], len(curve.losses)) == (1, 30, 30)
    assert (curve.validation_iterations, curve.validation_losses) == ([20], [0.3])
    assert title_of([curve]).startswith("run: loss 5 to ")


def test_line_that_is_still_being_written_is_passed_over(tmp_path):
    folder = write_metrics(tmp_path / "run", 30)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 31, "lo')
    assert read_curve(folder, "run").iterations[-1] == 30


def test_smoothing_keeps_a_straight_line_and_both_ends():
    line = [float(value) for value in range(100)]
    assert smoothed(line) == pytest.approx(line)
    assert smoothed([1.0]) == [1.0]
    noisy = [value + (-1) ** place for place, value in enumerate(line)]
    assert max(abs(a - b) for a, b in zip(smoothed(noisy)[5:-5], line[5:-5], strict=True)) < 0.25


def test_runs_are_named_apart():
    assert run_names([Path("/a/x/one"), Path("/a/x/two")]) == ["one", "two"]
    assert run_names([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]


def test_several_runs_make_one_picture(tmp_path):
    curves = [read_curve(write_metrics(tmp_path / name), name) for name in ("one", "two")]
    draw(curves, tmp_path / "new" / "loss.png", "Loss of 2 runs")
    assert png_size(tmp_path / "new" / "loss.png") == (1080, 600)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["loss.png"]


def test_tool_writes_beside_the_metrics(tmp_path):
    folder = write_metrics(tmp_path / "run")
    line = ["bash", str(ROOT / "tools/plot_loss"), str(folder)]
    done = subprocess.run(
        line,
        env=os.environ | {"MEGATRON_SFT_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == f"loss curve: {folder}/loss.png\n"
    assert png_size(folder / "loss.png") == (1080, 600)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist: give a run's folder"),
        ("", "has no training step yet"),
        ("hello\n", "line 1 is no line of metrics"),
        ('{"iteration": 1}\n', "line 1 is no line of metrics"),
    ],
)
def test_file_that_is_no_record_is_refused(tmp_path, content, message):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_curve(path, "run")


def test_runs_side_by_side_are_a_table_and_a_picture_by_tokens(tmp_path):
    for name, tokens in (("one", 1_000_000), ("two", 500_000)):
        lines = [
            {
                "iteration": step,
                "loss": 2.0,
                "lr": 1e-3,
                "epoch": step / 10,
                "tokens": tokens,
                "tokens_per_second": 100.0,
            }
            for step in (2, 4)  # every other step is logged
        ]
        lines[1]["sources"] = {"a": {"loss": 1.5, "trained_tokens": 9}}
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in [*lines, {"iteration": 3, "validation_loss": 1.25}])
        (tmp_path / name / "metrics.jsonl").write_text(text)
    curve = read_curve(tmp_path / "one", "one")
    assert (curve.x("tokens"), curve.x("epoch"), curve.validation_x("tokens")) == ([2.0, 4.0], [0.2, 0.4], [2.0])
    assert curve.sources == {"a": [(4, 1.5)]}
    line = [sys.executable, "-m", "megatron.sft.plot", "one", "two", "--x", "tokens", "--by-source"]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == [
        "| run | steps | million tokens | loss at the end | best validation | tokens/s |",
        "|---|---|---|---|---|---|",
        "| one | 4 | 4.00 | 2.0000 | 1.2500 | 100 |",
        "| two | 4 | 2.00 | 2.0000 | 1.2500 | 100 |",
        "loss curve: one/comparison.png",
    ]
    assert png_size(tmp_path / "one" / "comparison.png") == (1080, 600)


def test_smoothing_of_a_long_run_takes_its_steps_once():
    values = [float(value % 7) for value in range(200_000)]
    assert smoothed(values)[100_000] == pytest.approx(3.0, abs=0.01)
