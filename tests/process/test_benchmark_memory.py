"""The benchmark of memory, whole, on the CPU with a tiny model: what a GPU then measures at full size."""

import json
from pathlib import Path

import pytest

from benchmarks import memory
from benchmarks.memory_cases import SUITES, case_arguments, suite
from megatron.sft.planning.memory_phases import PHASES
from tests.support import tiny

WORKER_CASES = 5


@pytest.mark.timeout(300)
def test_every_case_goes_through_every_phase_and_one_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.save_qwen2(tmp_path / "model", tied=True)
    monkeypatch.setenv("MEGATRON_SFT_DEVICE", "cpu")
    status = memory.main(["--suite", "tiny", "--model", str(model), "--output", str(tmp_path / "results")])
    results = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert status == 1 and len(results) == WORKER_CASES
    *good, fp8 = results
    assert "Transformer Engine" in fp8["failed"]
    for result in good:
        expected = [*PHASES, "looking for a bad row"]
        if result is good[1]:  # the first one's state, which was resumed there
            expected.remove("resuming")
        assert list(result["phases"]) == expected
        assert result["seconds"] > 0 and result["decides"] in PHASES and result["phases"]["building"]["estimate"] > 0
    printed = capsys.readouterr().out
    assert all(f"| `{result['case']}` |" in printed for result in results)


def test_the_cases_of_every_suite_can_be_read() -> None:
    for name in SUITES:
        for case in suite(name):
            arguments = case_arguments(case)
            assert (arguments.steps, arguments.warm_up) == (2, 1) and arguments.gpus in (1, 2)


def test_the_worst_estimates_are_named() -> None:
    def result(case: str, peak: float, estimate: float) -> dict[str, object]:
        return {"case": case, "phases": {"forward and backward": {"peak": peak, "estimate": estimate}}}

    text = memory.worst([result("low", 10.0, 9.0), result("good", 10.0, 10.1), result("high", 10.0, 11.0)])
    assert "lowest estimate -10.0 % (low" in text and "highest +10.0 % (high" in text
