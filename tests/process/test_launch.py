"""What a user sees of a distributed run that fails: one line and the worker's own status, not torchrun's table."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.real_runs import pids_below

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import os, signal, sys, time
from megatron.sft.runtime.errors import UserError, run
from megatron.sft.runtime.signals import RESUME, StopRequest

def main():
    rank = int(os.environ["RANK"])
    case = sys.argv[1]
    os.write(1, f"started {sys.argv[2]}\\n".encode())  # a line at once: the other process writes, too
    if case == "all ranks":
        raise UserError("TP=2 does not divide 3: set TENSOR_PARALLEL_SIZE=3")
    if rank == 1 and case == "one rank":
        raise UserError("shard 1 is damaged: convert again")
    if rank == 1 and case == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and case == "crash":
        raise ValueError("boom")
    if case == "stopped":
        stop = StopRequest()
        stop.begin(0)
        os.write(1, b"ready\\n")
        while not stop.code(0):
            time.sleep(0.01)
        os.write(1, b"saved\\n")
        sys.exit(RESUME)
    if case == "busy":
        StopRequest().begin(0)
        os.write(1, b"ready\\n")
    if case == "frozen" and rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if case != "fine":
        time.sleep(30)
    return 0

run(main)
"""


# The launcher waits 30 s before it calls a stopped process one.
LAUNCHER = """
import sys
from megatron.sft import launch
from megatron.sft.runtime import elastic_agent
elastic_agent.STOPPED_SECONDS = float(sys.argv.pop(1))
sys.exit(launch.main())
"""


def start(folder: Path, case: str, stopped_seconds: float = 30, command: Sequence[str] = ()) -> subprocess.Popen[str]:
    script = folder / "worker.py"
    script.write_text(WORKER)
    arguments = ["--standalone", "--local-addr", "localhost", "--nproc-per-node", "2", str(script), case, "a b$(c)"]
    return subprocess.Popen(
        [*command, sys.executable, "-c", LAUNCHER, str(stopped_seconds), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launched(folder: Path, case: str) -> tuple[int, str, list[str]]:
    process = start(folder, case)
    output, errors = process.communicate(timeout=90)
    return process.returncode, output, errors.splitlines()


@pytest.mark.parametrize(
    "case, status, line",
    [
        ("all ranks", 2, "error: TP=2 does not divide 3: set TENSOR_PARALLEL_SIZE=3"),
        ("one rank", 2, "error: shard 1 is damaged: convert again"),
    ],
)
def test_a_users_mistake_is_one_line_whichever_rank_finds_it(tmp_path: Path, case: str, status: int, line: str) -> None:
    assert launched(tmp_path, case)[::2] == (status, [line])


def test_a_run_that_ends_well_prints_nothing_itself(tmp_path: Path) -> None:
    assert launched(tmp_path, "fine") == (0, "started a b$(c)\nstarted a b$(c)\n", [])


def test_a_crash_shows_its_trace_once_and_the_rank(tmp_path: Path) -> None:
    status, _, errors = launched(tmp_path, "crash")
    assert status == 1
    assert errors[-1] == "error: rank 1 ended with status 1: its messages are above"
    assert errors.count("ValueError: boom") == 1


def test_a_killed_process_is_named_with_its_signal(tmp_path: Path) -> None:
    status, _, (line,) = launched(tmp_path, "killed")
    assert status == 128 + signal.SIGKILL
    assert line.startswith("error: rank 1 (process ")
    assert line.endswith(" was ended by SIGKILL: often too little memory on this machine")


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    for _ in range(4):  # "started" and "ready" of two processes
        process.stdout.readline()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_stop_signal_reaches_the_workers_and_their_status_comes_back(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "stopped")
    wait_until_ready(process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=90)
    assert (process.returncode, errors) == (75, "")
    assert output.startswith(f"{number.name}: the run saves at the next step and ends") and output.count("saved\n") == 2


def test_a_run_under_nohup_does_not_end_with_its_terminal(tmp_path: Path) -> None:
    process = start(tmp_path, "stopped", command=["nohup"])
    wait_until_ready(process)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 75 and output.startswith("SIGTERM: the run saves at the next step and ends")


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, "busy")
    wait_until_ready(process)
    process.send_signal(signal.SIGTERM)
    assert process.stdout and process.stdout.readline().startswith("SIGTERM: the run saves")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (143, "ended immediately by a second signal; the last checkpoint is good\n")


def test_a_stopped_process_is_named_and_ended(tmp_path: Path) -> None:
    process = start(tmp_path, "frozen", stopped_seconds=2)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 124
    assert re.fullmatch(r"error: rank 1 \(process \d+\) was stopped, as SIGSTOP does, for 2 s\n", errors)


def test_no_process_outlives_a_killed_launcher(tmp_path: Path) -> None:
    process = start(tmp_path, "busy")
    wait_until_ready(process)
    workers = pids_below(process.pid)
    assert len(workers) == 2
    process.kill()
    process.communicate(timeout=90)
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
