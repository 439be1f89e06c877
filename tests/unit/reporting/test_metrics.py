"""The log line, metrics.jsonl and its trackers, from real figures."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron.sft.reporting import metrics
from megatron.sft.reporting.curves import read_curve
from megatron.sft.reporting.metrics import MetricsLog
from megatron.sft.reporting.trackers import tracked_values
from tests.support import tiny
from tests.support.step_figures import RECORD, SHAPE

# Of 1,000 tokens: 6 * layers * weights; of 600: 6 * hidden * vocabulary; 6 * layers * heads * head size * squared lengths.
OPERATIONS = 6 * 2 * (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16) * 1000 + 6 * 8 * 100 * 600 + 6 * 2 * 2 * 4 * 50_000


def test_line_and_record_count_operations_of_this_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MetricsLog(tmp_path, 100, 80, 0, SHAPE).step(RECORD)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("iteration   5/100 | epoch 0.50 | loss 1.2500 | lr 1.00e-05 | grad norm 0.50 | 0.00 s | ")
    assert "| 1000.0k tokens/s | ETA 0m" in line and len(line) <= 120
    assert "MFU" not in line and "skipped" not in line  # no GPU's peak to compare with
    [record] = tiny.metrics(tmp_path)
    assert record["tflops_per_process"] == round(OPERATIONS / 0.001 / 2 / 1e12, 4) == 0.0073
    assert (record["memory_bytes"], record["tokens_per_second"]) == (3 << 30, 1e6)


PAIRS = {"rewards/chosen": 0.25, "rewards/rejected": -0.5, "rewards/accuracies": 0.75, "rewards/margins": 0.75}
PAIRS |= {"logps/chosen": -40.0, "logps/rejected": -60.5, "preference_loss": 0.5, "sft_loss": 2.0}


def test_metrics_of_pairs_are_in_the_line_the_record_and_the_trackers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(tmp_path, 100, 80, 0, SHAPE)
    log.step(replace(RECORD, pairs=PAIRS))
    log.validation(5, 0.5, 10, PAIRS)
    for line in capsys.readouterr().out.splitlines():
        parts = "SFT part 2.0000 | rewards +0.2500 -0.5000, margin 0.7500, accuracy 75 % | log p -40.0 -60.5 |"
        assert parts in line
    step, validation = tiny.metrics(tmp_path)
    assert step.items() >= PAIRS.items() and validation.items() >= PAIRS.items() and "pairs" not in step
    for kind, line in (("train", step), ("validation", validation)):
        tracked = tracked_values(line)
        assert {f"{kind}/{name}": value for name, value in PAIRS.items()}.items() <= tracked.items()
    assert tracked["validation/loss"] == 0.5


def test_mfu_is_shown_where_the_peak_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics.device, "peak_tflops", lambda: OPERATIONS / 0.001 / 2 / 1e12 / 0.5)
    MetricsLog(tmp_path, 100, 80, 0, SHAPE).step(replace(RECORD, skipped_steps=3, loss_scale=65536.0))
    line = capsys.readouterr().out
    assert ", MFU 50.0 % |" in line and "| skipped 3 | loss scale 65536 |" in line
    assert tiny.metrics(tmp_path)[0]["mfu"] == 0.5


def test_a_validation_loss_that_is_not_finite_is_null_and_is_not_drawn(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 100, 80, 0, SHAPE)
    log.step(RECORD)
    log.validation(4, 2.0, 10)
    log.validation(8, float("nan"), 10)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert tiny.metrics(tmp_path)[-1] == {"iteration": 8, "validation_loss": None, "trained_tokens": 10}
    curve = read_curve(tmp_path, "run")
    assert (curve.validation_iterations, curve.validation_losses) == ([4], [2.0])


def test_what_a_resumed_run_does_again_is_forgotten(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 100, 80, 0, SHAPE)
    for iteration in range(1, 7):
        log.step(replace(RECORD, iteration=iteration))
    log.validation(4, 2.0, 10)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 2, "los')  # killed while writing
    metrics.forget_after(tmp_path, 4)
    assert [line["iteration"] for line in tiny.metrics(tmp_path)] == [1, 2, 3, 4, 4]
