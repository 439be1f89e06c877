"""Runs one function over many items in processes, gives the results in the order of the items, and shows the progress."""

import gc
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.signals import end_with_parent

WAITING = 3  # items for each worker that are read ahead, finished ones included
SECONDS_BETWEEN_LINES = 30.0  # of progress, where there is no terminal

Item = TypeVar("Item")
Result = TypeVar("Result")
_function: Callable[[Any], Any] | None = None  # what a worker process was forked for


def in_order(function: Callable[[Item], Result], items: Iterable[Item], num_workers: int) -> Iterator[Result]:
    """The results in the order of the items. With one worker this process does the work.

    Workers are forked, so they have what `function` refers to, and what they change in it stays with them. Items and
    results are pickled. A worker that dies is a `UserError`.
    """
    iterator = iter(items)
    first = list(itertools.islice(iterator, 2))
    if num_workers == 1 or len(first) < 2:
        yield from map(function, itertools.chain(first, iterator))
        return
    # Forked, not spawned: each would take seconds to import what is in memory already.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(function, os.getpid()))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in itertools.chain(first, iterator):
            waiting.append(pool.submit(_work, item))
            if len(waiting) >= WAITING * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, perhaps for lack of memory: give fewer workers (NUM_WORKERS) and run again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    gc.freeze()  # so that the collector does not touch, and thereby copy, memory that is shared with the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with_parent(parent)  # workers of a parent that is killed would wait for work forever


def _work(item: Any) -> Any:
    assert _function is not None
    return _function(item)


class Progress:
    """How far a source of `num_bytes` has been read, on stderr: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = max(num_bytes, 1)
        self.num_records = 0
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=num_bytes, unit="B", unit_scale=True, desc="tokenising", leave=False)

    def update(self, num_new_records: int, num_bytes_read: int) -> None:
        self.num_records += num_new_records
        now = time.monotonic()
        records_per_second = self.num_records / max(now - self.started, 1e-9)
        if self.bar is not None:
            self.bar.set_postfix_str(f"{records_per_second:,.0f} records/s", refresh=False)
            self.bar.update(num_bytes_read - self.bar.n)
        elif now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            share = num_bytes_read / self.num_bytes
            seconds_left = (now - self.started) * (1 - share) / share
            print(
                f"tokenised {self.num_records:,} records ({100 * share:.0f} % of the data), {records_per_second:,.0f} "
                f"records/s, about {seconds_left:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
