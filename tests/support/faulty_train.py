"""megatron.sft.train as the tests for faults start it: it writes down every part that it enters, so that a test knows when to
strike, and has things break in this process when a part is entered.

The environment variable FAULTS is a JSON object:
  announce  file that gets a line `rank pid part iteration` for every part
  poison    a token whose embedding is NaN from the start; not with tensor parallelism
  hold      [part, iteration, rank, seconds]: stay there for a while; iteration 0 is any, rank -1 is any
  break     [part, iteration, rank, what]: from there on `what` goes wrong: "data worker", "checkpoint writer", or a file name,
            which is made for tests/support/failing_disk.c to see
"""

import errno
import importlib.abc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from megatron.sft import train
from megatron.sft.runtime import watchdog

FAULTS: dict[str, Any] = json.loads(os.environ.get("FAULTS", "{}"))
RANK = int(os.environ.get("RANK", "0"))


def announce(part: str, iteration: int) -> None:
    if "announce" in FAULTS:
        with open(FAULTS["announce"], "a") as file:
            file.write(f"{RANK} {os.getpid()} {part.replace(' ', '-')} {iteration}\n")
    if _is_here("break", part, iteration):
        go_wrong(FAULTS["break"][3])
    if _is_here("hold", part, iteration):
        time.sleep(FAULTS["hold"][3])


def _is_here(what: str, part: str, iteration: int) -> bool:
    if what not in FAULTS:
        return False
    wanted_part, wanted_iteration, wanted_rank, _ = FAULTS[what]
    return part == wanted_part and wanted_iteration in (0, iteration) and wanted_rank in (-1, RANK)


def go_wrong(what: str) -> None:
    if what == "data worker":
        from megatron.sft.training.feeder import Feeder

        Feeder.row = _unreadable  # type: ignore[assignment,method-assign]
    elif what == "checkpoint writer":
        from megatron.sft.checkpoint.writing import HashedFile

        HashedFile.write = _unwritable  # type: ignore[assignment,method-assign]
    else:
        Path(what).touch()


def _unreadable(*_: Any) -> NoReturn:
    raise OSError(errno.EIO, "injected: the data cannot be read")


def _unwritable(*_: Any) -> NoReturn:
    raise RuntimeError("injected: the checkpoint's writer died")


def poisoned(load_start: Any) -> Any:
    def load(engine: Any) -> None:
        load_start(engine)
        for chunk in engine.chunks:
            if chunk.pre_process:
                chunk.embedding.word_embeddings.weight.data[FAULTS["poison"]] = float("nan")
        engine.optimizer.reload_model_params()

    return load


class PoisonWhenImported(importlib.abc.MetaPathFinder):
    """Wraps `load_start` once the loop is imported, which must not be before the training entry does it."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "megatron.sft.training.loop":
            sys.meta_path.remove(self)
            from megatron.sft.training import state

            state.load_start = poisoned(state.load_start)


def announcing(enter: Any, start: Any) -> None:
    def entered(part: str, iteration: int | None = None) -> None:
        enter(part, iteration)
        announce(part, watchdog._now.iteration)

    def started(minutes: float) -> None:
        start(minutes)
        announce("start-up", 0)

    watchdog.enter, watchdog.start = entered, started


if __name__ == "__main__":
    announcing(watchdog.enter, watchdog.start)
    if "poison" in FAULTS:
        sys.meta_path.insert(0, PoisonWhenImported())
    train._end()
