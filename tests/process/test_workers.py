"""Work in processes: results in order, errors and deaths reported, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron.sft.data.workers import in_order
from megatron.sft.runtime.errors import UserError

ROOT = Path(__file__).parents[2]


def slow_square(number: int) -> tuple[int, int]:
    time.sleep(0.02 if number % 3 == 0 else 0.0)
    return number * number, os.getpid()


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_results_come_in_the_order_of_the_items(num_workers: int) -> None:
    results = list(in_order(slow_square, range(40), num_workers))
    assert [square for square, _ in results] == [number * number for number in range(40)]
    processes = {process for _, process in results}
    assert (processes == {os.getpid()}) == (num_workers == 1)


def test_items_are_read_only_a_little_ahead() -> None:
    before = set(psutil.Process().children())  # other tests may have left helpers of their libraries
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = in_order(slow_square, items(), 2)
    for _ in range(10):
        next(results)
    assert len(taken) < 30
    results.close()  # type: ignore[attr-defined]
    assert set(psutil.Process().children()) == before


def die(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def refuse(number: int) -> int:
    if number == 5:
        raise UserError("five")
    return number


def test_a_dead_worker_is_reported_and_an_error_passes_through() -> None:
    before = set(psutil.Process().children())  # other tests may have left helpers of their libraries
    with pytest.raises(UserError, match=r"a worker process died.*NUM_WORKERS"):
        list(in_order(die, range(20), 2))
    with pytest.raises(UserError, match=r"^five$"):
        list(in_order(refuse, range(20), 2))
    assert set(psutil.Process().children()) == before


SLEEPERS = """
import time
from megatron.sft.data.workers import in_order
def sleep(number):
    time.sleep(0.1)
    return number
for number in in_order(sleep, range(10_000), 2):
    print(number, flush=True)
"""


def test_workers_end_with_a_parent_that_is_killed() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", SLEEPERS], env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        workers = psutil.Process(parent.pid).children()
        assert len(workers) == 2
        parent.kill()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
