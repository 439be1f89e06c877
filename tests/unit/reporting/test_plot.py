"""The loss curve: what is read from metrics.jsonl, and that a readable PNG comes out."""

from pathlib import Path

import pytest

from megatron.sft.reporting.curves import read_curve, run_names
from megatron.sft.reporting.loss_plot import draw, smoothed, title_of
from megatron.sft.runtime.errors import UserError
from tests.support.metrics_material import png_size, write_metrics


def test_training_and_validation_lines_are_distinguished(tmp_path):
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
    assert png_size(tmp_path / "new" / "loss.png") == (864, 576)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["loss.png"]


def test_margins_of_pairs_are_read_and_drawn_below_the_losses(tmp_path):
    curve = read_curve(write_metrics(tmp_path / "pairs", 30, pairs=True), "pairs")
    assert curve.margins[:3] == [0.0, 0.1, 0.2] and len(curve.margins) == 30 and curve.validation_margins == [2.0]
    figures = [[curve], [curve, read_curve(write_metrics(tmp_path / "sft"), "sft")]]
    for number, curves in enumerate(figures):
        draw(curves, tmp_path / f"{number}.png", "margins")
        assert png_size(tmp_path / f"{number}.png") == (864, 576)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist: give a run's folder"),
        ("", "has no training step yet"),
        ("hello\n", "line 1 is not metrics"),
        ('{"iteration": 1}\n', "line 1 is not metrics"),
    ],
)
def test_file_that_is_not_a_record_is_refused(tmp_path, content, message):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_curve(path, "run")


def test_smoothing_of_a_long_run_takes_its_steps_once():
    values = [float(value % 7) for value in range(200_000)]
    assert smoothed(values)[100_000] == pytest.approx(3.0, abs=0.01)
