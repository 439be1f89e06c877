"""Saving a run's checkpoints, so that each is whole or absent, during training (ASYNC_SAVE=1) or while it waits.

A save has three parts. In the main thread all processes agree that it can start, and copy their state into CPU memory. A thread
in each process writes that copy, and rank 0's thread assembles one checkpoint of all parts. The main threads learn the result
at the same step.
"""

import itertools
import json
import math
import os
import shutil
import time

import psutil  # type: ignore[import-untyped]
import torch

from megatron.sft.checkpoint.background import SaveResult, SaveTask, StoreMailbox
from megatron.sft.checkpoint.folder import Kept, check_room, clear_leftovers, iteration_path, unfinished_path
from megatron.sft.checkpoint.optimizer_state import values_without_state
from megatron.sft.checkpoint.shard_slice import ShardSlice
from megatron.sft.checkpoint.staging import BackgroundAllocation, Staging, staged_bytes
from megatron.sft.hf.names import shown
from megatron.sft.runtime import device, ranks
from megatron.sft.runtime.errors import UserError
from megatron.sft.training.engine import Engine
from megatron.sft.training.state import run_manifest, run_slices
from megatron.sft.training.steering.watch import watch_of

# Counts all saves of this process: texts about one must not be taken for another's.
_save_numbers = itertools.count(1)


class Saver:
    """Writes the checkpoints of one run. Every rank calls the same methods in the same order.

    `last_saved` is the iteration of the newest whole checkpoint, None before this process's first; set it after resuming, so
    that nothing is saved twice. `watch` goes into every manifest. `spared`: iterations that KEEP_LAST does not remove now.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.last_saved: int | None = None
        self.watch = watch_of(engine.plan)
        self.spared: frozenset[int] = frozenset()
        self._options = engine.plan.options
        self._root = self._options.save
        self._staging = Staging()
        self._allocation: BackgroundAllocation | None = None
        self._task: SaveTask | None = None
        self._mailbox: StoreMailbox | None = None
        self._polls = 0
        if ranks.is_rank_0() and self._root.is_dir():
            clear_leftovers(self._root)

    def save(self, iteration: int, consumed_rows: int) -> None:
        """Write a checkpoint, or start to if saving is asynchronous, after a save that is still running has ended.

        A `UserError` on every rank if it cannot be written; the tracker and earlier checkpoints stay valid.
        """
        self.finish()
        if self.last_saved == iteration:
            return
        if self._allocation is not None:
            self._allocation.wait()
        started = time.monotonic()
        with self.engine.gathered_parameters():
            slices = run_slices(self.engine)
            staged = self._start(iteration, slices)
            self.watch.saved(iteration)
            manifest = run_manifest(self.engine, consumed_rows, self.watch)
            if staged:
                slices = self._staging.copy(slices)
            number = next(_save_numbers)
            self._mailbox = StoreMailbox(number)
            timeout = 60 * self._options.distributed_timeout_minutes
            kept = Kept(self._options.keep_last, self._options.keep_every, self.spared)
            plan = self.engine.plan
            omitted = values_without_state(plan.architecture, plan.trained.frozen)
            self._task = SaveTask(self._root, iteration, slices, manifest, kept, StoreMailbox(number), timeout, omitted)
            self._task.start(started)
            self._task.stalled_seconds = time.monotonic() - started
            if not staged:
                self.finish()

    def poll(self) -> None:
        """Call after every step: reports a save that has ended meanwhile. A `UserError` on every rank if it failed."""
        self._polls += 1
        if self._polls == 1 and self._options.async_save:
            # Page-locked memory takes seconds to allocate; the first save would stall for it.
            slices = run_slices(self.engine)
            if _has_memory(self._staging, slices):
                self._allocation = BackgroundAllocation(self._staging, slices)
        if self._task is None:
            return
        result = self._poll_result()
        # Ranks are never more than a step apart, so at the next poll all of them see what rank 0 announces now.
        if result is not None and result.poll <= self._polls:
            self._finish(result)

    def finish(self) -> None:
        """Wait for the running save, if there is one; raises as `poll`. Call it at every exit that can be caught."""
        while self._task is not None:
            result = self._poll_result()
            if result is not None:
                self._finish(result)
            else:
                time.sleep(0.01)

    def _start(self, iteration: int, slices: list[ShardSlice]) -> bool:
        """Make the folder, if the disk has room. Returns whether to copy the state first, the same on all ranks."""
        num_bytes = sum(part.num_bytes for part in slices)
        waits = not self._options.async_save or not _has_memory(self._staging, slices)
        sums = torch.tensor([num_bytes, waits], dtype=torch.float64, device=device.current())
        torch.distributed.all_reduce(sums)
        total, num_waiting = (int(value) for value in sums.tolist())
        problem: list[str | None] = [None]
        if ranks.is_rank_0():
            try:
                self._root.mkdir(parents=True, exist_ok=True)
                clear_leftovers(self._root)
                check_room(self._root, total, iteration)
                unfinished_path(self._root, iteration).mkdir()
            except (UserError, OSError) as error:
                problem = [str(error)]
        torch.distributed.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise UserError(f"nothing was written of iteration {iteration}: {problem[0]}{self._advice()}")
        if self.last_saved is None:
            self._warn_if_disk_too_small(iteration, total)
            if num_waiting and self._options.async_save:
                ranks.print_rank_0("training waits for each save: a copy of the state does not fit into CPU memory")
        return not num_waiting

    def _warn_if_disk_too_small(self, iteration: int, num_bytes: int) -> None:
        """Warn at the first save if the disk has no room for all later ones. `num_bytes`: of one checkpoint."""
        if not ranks.is_rank_0():
            return
        saves = math.ceil((self.engine.plan.train_iters - iteration) / self._options.save_interval)
        # One more than are kept exists while it is written.
        count = min(saves, self._options.keep_last or saves) + 1
        free = shutil.disk_usage(self._root).free
        if count * num_bytes > free:
            ranks.print_rank_0(
                f"warning: {count} checkpoints of {num_bytes / 1e9:.2f} GB do not fit into the {free / 1e9:.2f} GB that "
                f"{self._root} has free: set KEEP_LAST to a smaller number, or make room before they are written"
            )

    def _poll_result(self) -> SaveResult | None:
        """How the running save ended, once rank 0 has announced it, else None."""
        assert self._task is not None and self._mailbox is not None
        self._task.report_death()
        text = self._mailbox.get("result")
        if text is None and ranks.is_rank_0() and self._task.result is not None:
            text = json.dumps({**self._task.result, "poll": self._polls + 1})
            self._mailbox.put("result", text)
        return None if text is None else SaveResult(**json.loads(text))

    def _finish(self, result: SaveResult) -> None:
        task, self._task = self._task, None
        assert task is not None
        task.cancel()
        if result.error:
            if ranks.is_rank_0():
                shutil.rmtree(unfinished_path(self._root, task.iteration), ignore_errors=True)
            raise UserError(f"the checkpoint of iteration {task.iteration} was not written: {result.error}{self._advice()}")
        self.last_saved = task.iteration
        saved = f"saved {shown(iteration_path(self._root, task.iteration))} in {result.seconds:.1f} s"
        was_async = task.stalled_seconds < 0.9 * result.seconds
        ranks.print_rank_0(saved + (f", training stalled for {task.stalled_seconds:.1f} s" if was_async else ""))
        for note in result.notes:
            ranks.print_rank_0(note)

    def _advice(self) -> str:
        kept = f"; iteration {self.last_saved} is kept" if self.last_saved else ""
        return f"{kept} (fix this, then run the same command)"


def _has_memory(staging: Staging, slices: list[ShardSlice]) -> bool:
    """Whether a copy of the state fits into this machine's memory, with as much for each of its other processes."""
    if staging.has_capacity(slices):
        return True
    return staged_bytes(slices) * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < 0.8 * psutil.virtual_memory().available
