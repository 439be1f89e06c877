"""The layouts that `benchmarks.cluster` compares train the same random weights; what it counts as waiting."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.waiting import Shares, shares
from tests.support import tiny, tiny_families


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("qwen2_tied_bf16", ["--tensor-parallel", 2]),
        ("llama3", ["--pipeline-parallel", 2]),
        ("qwen3_moe", ["--expert-parallel", 2, "--micro-batches", 1]),
    ],
)
def test_a_benchmark_has_the_same_losses_in_every_layout(tmp_path: Path, family: str, words: list[object]) -> None:
    folder = tiny_families.save_family(tmp_path / "model", family)
    alone = json.loads(tiny.run_script(Path(__file__), folder).strip().splitlines()[-1])
    output = tiny.launch_test_worker(2, Path(__file__), folder, *words)
    spread = json.loads(next(line for line in output.splitlines() if line.startswith("[")))
    assert len(set(alone)) == len(alone)
    assert spread == pytest.approx(alone, rel=1e-5)


def test_time_in_which_only_communication_runs_is_exposed() -> None:
    kernels = [
        ("matmul", (0.0, 40.0)),
        ("ncclDevKernel_AllReduce", (30.0, 60.0)),
        ("ncclDevKernel_SendRecv", (50.0, 80.0)),
        ("matmul", (80.0, 100.0)),
    ]
    assert shares(kernels) == Shares(communication=0.5, exposed=0.4, between_stages=0.2)


def _losses() -> None:
    from benchmarks import ours, train
    from megatron.sft.runtime import ranks

    folder, *words = sys.argv[1:]
    asked = ["--model", folder, "--row-length", "128", "--conversations", "50,40,38", "--stack", "ours", "--precision", "fp32"]
    arguments = train.parse([*asked, "--steps", "3", "--warm-up", "0", "--micro-batches", "2", *words])
    losses = ours.measure_steps(arguments, train.rows_of(arguments, tiny.VOCAB_SIZE, 16))[1]
    if ranks.is_rank_0():
        print(json.dumps(losses), flush=True)


if __name__ == "__main__":
    _losses()
