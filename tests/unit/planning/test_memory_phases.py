"""The memory that `plan` expects in each phase of a run, next to what `python -m benchmarks.memory` measured on H200 GPUs."""

import json
from pathlib import Path

import pytest

from benchmarks.memory_cases import case_arguments
from benchmarks.ours import benchmark_plan
from benchmarks.train import rows_of
from megatron.sft.planning.memory import GIB, estimate
from megatron.sft.training.engine import memory_of

# GiB by case and phase. Building is not among them: the benchmark's random weights take memory of their own.
MEASURED: dict[str, dict[str, float]] = json.loads(Path(__file__).with_name("measured_memory.json").read_text("utf-8"))


@pytest.mark.parametrize("case", MEASURED)
def test_no_phase_takes_5_percent_more_or_10_percent_less(case: str) -> None:
    arguments = case_arguments(case)
    plan = benchmark_plan(arguments, rows_of(arguments, 1000, 1))
    expected = estimate(plan.architecture, plan.layout, plan.data_parallel, memory_of(plan)).phases()
    for phase, measured in MEASURED[case].items():
        assert -0.05 <= expected[phase] / GIB / measured - 1 <= 0.10, (phase, expected[phase] / GIB, measured)
