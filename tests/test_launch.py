"""What a user sees of a distributed run that fails: one line and the worker's own status, not torchrun's table."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKER = """
import os, signal, sys, time
from megatron.sft.errors import UserError, run

def main():
    rank = int(os.environ["RANK"])
    case = sys.argv[1]
    print("started", sys.argv[2], flush=True)
    if case == "all ranks":
        raise UserError("TP=2 does not divide 3: set TENSOR_PARALLEL_SIZE=3")
    if rank == 1 and case == "one rank":
        raise UserError("shard 1 is damaged: convert again")
    if rank == 1 and case == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and case == "crash":
        raise ValueError("boom")
    if case == "stopped":
        signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(0)))
    if case != "fine":
        time.sleep(30)

run(main)
"""


def start(folder: Path, case: str) -> subprocess.Popen[str]:
    script = folder / "worker.py"
    script.write_text(WORKER)
    arguments = ["--standalone", "--local-addr", "localhost", "--nproc-per-node", "2", str(script), case, "a b$(c)"]
    return subprocess.Popen(
        [sys.executable, "-m", "megatron.sft.launch", *arguments],
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


def test_a_run_that_ends_well_prints_nothing_of_its_own(tmp_path: Path) -> None:
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


def test_a_stop_signal_reaches_the_workers_and_is_passed_on(tmp_path: Path) -> None:
    process = start(tmp_path, "stopped")
    assert process.stdout
    process.stdout.readline()
    process.stdout.readline()
    time.sleep(0.5)  # from printing to handling the signal
    process.terminate()
    output, errors = process.communicate(timeout=90)
    assert (process.returncode, output, errors) == (128 + signal.SIGTERM, "saved\nsaved\n", "stopped by SIGTERM\n")
