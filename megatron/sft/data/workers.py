"""Runs one function over many items in processes, and gives the results in the order of the items."""

import ctypes
import gc
import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from megatron.sft.runtime.errors import UserError

PR_SET_PDEATHSIG = 1
WAITING = 3  # items for each worker that are read ahead, done ones included

Item = TypeVar("Item")
Result = TypeVar("Result")
_function: Callable[[Any], Any] | None = None  # what a worker process was forked for


def in_order(function: Callable[[Item], Result], items: Iterable[Item], num_workers: int) -> Iterator[Result]:
    """The results, one after another, however many workers there are. With one worker this process does the work.

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
            "a worker process died, perhaps for want of memory: give fewer workers (NUM_WORKERS) and run again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    gc.freeze()  # so that collecting does not touch, and so copy, what is shared with the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, too, and ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Workers of a parent that is killed would wait for work forever.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _work(item: Any) -> Any:
    assert _function is not None
    return _function(item)
