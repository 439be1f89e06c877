"""Runs that are interrupted, killed and fed with NaN: they end with a reason and continue as if nothing had happened.

The short set; `bash tests/faults.sh` runs all of it.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.sft.data.row_order import RowOrder, split_rows
from tests.campaigns.kill_campaign import Campaign
from tests.campaigns.signal_campaign import POISON, poison, try_out
from tests.support import pair_material, tiny
from tests.support.real_runs import STEPS, Material, RealRun, assert_same_run, make_material


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("layout", ["1x1", "TP2 with adapters"])
def test_killed_runs_end_as_if_no_one_had_killed_them(material: Material, layout: str) -> None:
    campaign = Campaign(material, layout, seed=1)
    campaign.run(2)
    assert campaign.kills.total() >= 2


@pytest.mark.parametrize(
    "fault, moment",
    [
        ("SIGTERM", "start"),
        ("SIGUSR1", "validation"),
        ("SIGTERM to one rank", "save"),
        ("ENOSPC", "save"),
        ("dead data worker", "step"),
    ],
)
def test_a_fault_loses_nothing(material: Material, fault: str, moment: str) -> None:
    try_out(material, fault, moment, "1x1")


def test_a_fault_loses_no_adapters(material: Material) -> None:
    try_out(material, "SIGTERM", "step", "TP2 with adapters")


def test_a_run_ends_before_its_time_limit_with_everything_saved(material: Material, tmp_path: Path) -> None:
    run = RealRun(material, tmp_path / "limited", "1x1", ["--train-iters", "1000000", "--exit-after-minutes", "0.2"])
    run.arguments += ["--log-interval", "20", "--save-interval", "1000000", "--split", "100,0,0"]
    assert run.start().finish() == 75
    steps = re.search(
        r"stopped by EXIT_AFTER_MINUTES (after iteration (\d+), which is saved|before the first step)", run.output
    )
    assert steps and run.latest() == int(steps[2] or 0)


def test_the_same_command_continues_a_run_of_which_a_process_died(material: Material, tmp_path: Path) -> None:
    run = RealRun(material, tmp_path / "continued", "DP2", ["--async-save", "0"])
    seen = run.start({"hold": ["forward and backward", 7, 1, 1.0]}).wait_for("forward and backward", 7, 1)
    assert seen
    os.kill(seen.pid, signal.SIGKILL)
    assert run.finish() == 128 + signal.SIGKILL, run.output
    assert f"rank 1 (process {seen.pid}) was ended by SIGKILL" in run.output
    assert run.start().finish() == 0, run.output
    assert "resumed at iteration 6" in run.output
    assert_same_run(run, material.reference("DP2"))


def test_the_launcher_refuses_to_start_a_run_again(material: Material, tmp_path: Path) -> None:
    run = RealRun(material, tmp_path / "restarted", "1x1")
    run.launcher += ["--max-restarts", "3"]
    assert run.start().finish() == 2
    errors = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--max-restarts 3" in errors[0] and "scripts/cluster/submit.sh" in errors[0], run.output


def test_numbers_that_are_not_finite_are_traced_to_their_conversation(material: Material, tmp_path: Path) -> None:
    poisoned = poison(material, "traced", 5)
    run = RealRun(poisoned, tmp_path / "nan", "DP2")
    assert run.start(POISON).finish() == 2
    line = run.output.splitlines()[-1]
    found = re.fullmatch(
        r"error: iteration 5: the gradient is not finite \(norm nan\): row (\d+), conversation 1 of \d+ of (\S+) "
        r"\(tools/show_sample (\S+) (\d+)\); lower LR, fix the data, or skip such steps with ON_NAN=skip",
        line,
    )
    assert found, run.output
    assert found[2] == found[3] == str(poisoned.data) and found[1] == found[4]
    from megatron.sft.data.tokenized import TokenizedRows

    assert tiny.VOCAB_SIZE - 1 in TokenizedRows(poisoned.data)[int(found[1])].tokens


def test_numbers_that_are_not_finite_are_traced_to_their_pair(material: Material, tmp_path: Path) -> None:
    """The reference is not poisoned: it is another reading of the weights."""
    rows = pair_material.random_pair_rows(48, 128)
    training, _ = split_rows(len(rows), 0.9, 0.1, seed=1234)
    number = int(RowOrder(training, seed=1234).row_at(4 * 2))
    last = tiny.VOCAB_SIZE - 1
    for row in rows:
        for pair in row:
            for tokens in (pair.prompt, pair.chosen, pair.rejected):
                tokens[:] = [min(token, last - 1) for token in tokens]
    rows[number][1].rejected[0] = last
    data = pair_material.write_pair_rows(tmp_path / "pairs", rows, 128)
    run = RealRun(Material(material.checkpoint, data, tmp_path), tmp_path / "run", "DP2", ["--objective", "dpo"])
    assert run.start(POISON).finish() == 2
    found = f"iteration 3: the gradient is not finite (norm nan): row {number}, pair 2 of {len(rows[number])} of {data} ("
    assert found in run.output.splitlines()[-1], run.output


def test_a_skipped_step_changes_nothing_but_the_position(material: Material, tmp_path: Path) -> None:
    run = RealRun(poison(material, "traced", 5), tmp_path / "nan", "DP2", ["--on-nan", "skip", "--save-interval", "1"])
    assert run.start(POISON).finish() == 0, run.output
    before, after = (json.loads((run.save / f"iter_000000{n}" / "manifest.json").read_text()) for n in (4, 5))
    tensors = [name for name in before["files"] if name.endswith(".distcp")]
    assert tensors and all(before["files"][name] == after["files"][name] for name in tensors)
    assert before["training"]["counters"]["skipped_steps"] == 0 and after["training"]["counters"]["skipped_steps"] == 1
    assert after["training"]["consumed_rows"] == before["training"]["consumed_rows"] + 4
    logged = {line["iteration"]: line for line in tiny.metrics(run.save) if "loss" in line}
    assert sorted(logged) == [1, 2, 3, 4, *range(6, STEPS + 1)] and logged[6]["skipped_steps"] == 1
    run = RealRun(poison(material, "traced", 5), tmp_path / "none", "1x1", ["--on-nan", "skip", "--max-skipped", "0"])
    assert run.start(POISON).finish() == 2 and "1 steps skipped, the limit is MAX_SKIPPED=0" in run.output


def test_a_run_whose_first_step_was_skipped_can_be_saved_and_continued(material: Material, tmp_path: Path) -> None:
    options = ["--on-nan", "skip", "--save-interval", "1", "--train-iters"]
    first = RealRun(poison(material, "first", 1), tmp_path / "first", "1x1", [*options, "1"])
    assert first.start(POISON).finish() == 0 and first.latest() == 1, first.output
    more = RealRun(first.material, first.save, "1x1", [*options, "2"])
    assert more.start(POISON).finish() == 0 and more.latest() == 2, more.output
    assert json.loads((more.save / "iter_0000002" / "manifest.json").read_text())["training"]["optimizer"]["step"] == 1


STALLING = """
import os, time
import torch.distributed
from megatron.sft.runtime import watchdog
watchdog.start(5 / 60)
rank = int(os.environ["RANK"])
watchdog.enter("forward and backward", 6)
watchdog.enter("data", 7)
if rank == 0:
    time.sleep(0.5)
    watchdog.enter("forward and backward")
time.sleep(60)
"""


def test_the_watchdog_names_the_process_that_holds_up_the_others_and_its_part(tmp_path: Path) -> None:
    script = tmp_path / "stalling.py"
    script.write_text(STALLING)
    command = [sys.executable, "-m", "megatron.sft.launch", "--standalone", "--local-addr", "localhost"]
    result = subprocess.run(
        [*command, "--nproc-per-node", "2", str(script)],
        env={**os.environ, "PYTHONPATH": str(tiny.ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert result.returncode == 124
    assert re.match(r"error: rank 1 hung for \d+ s in iteration 7, data; waiting: rank 0 in iteration 7, ", result.stderr)
