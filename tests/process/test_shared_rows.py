"""Runs whose rows are shared between processes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import tiny

OPTIONS = ["--split", "90,10,0", "--eval-interval", "5", "--save-interval", "5"]


def test_a_run_with_shared_rows_logs_and_resumes_as_one_process_does(train: Callable[..., Path], tmp_path: Path) -> None:
    one = train(1, *OPTIONS)
    shared = train(2, *OPTIONS, "--context-parallel-size", "2")
    for name in ("tokens", "trained_tokens"):
        counts = [[line[name] for line in tiny.metrics(run) if "loss" in line] for run in (one, shared)]
        assert len(counts[0]) == 10 and counts[0] == counts[1], name
    assert tiny.losses(shared) == pytest.approx(tiny.losses(one), rel=1e-6)
    assert tiny.validation_losses(shared) == pytest.approx(tiny.validation_losses(one), rel=1e-6)

    for number, (start, processes, sizes) in enumerate([(shared, 1, []), (one, 2, ["--context-parallel-size", "2"])]):
        run = tiny.as_of(5, start, tmp_path / f"resumed_{number}")
        train(processes, *OPTIONS, *sizes, mode="resume", save=run)
        assert tiny.losses(run) == pytest.approx(tiny.losses(one), rel=1e-6)
        assert tiny.validation_losses(run) == pytest.approx(tiny.validation_losses(one), rel=1e-6)
