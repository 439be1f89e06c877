"""Saving a run's checkpoints, so that each is whole or absent, while training goes on (ASYNC_SAVE=1) or in between.

A save has three parts. In the main thread all processes agree that it can begin and copy their state into CPU memory. A thread
in each process writes that copy, and the first process's thread makes one checkpoint of what all have written. The main
threads take note of the end at the same step.
"""

import itertools
import json
import math
import os
import shutil
import time

import torch

from megatron.sft.checkpoint.background import Exchange, Job, Outcome
from megatron.sft.checkpoint.folder import check_room, clear_leftovers, iteration_path, unfinished_path
from megatron.sft.checkpoint.pieces import Piece
from megatron.sft.checkpoint.staging import Preparation, Staging, staged_bytes
from megatron.sft.runtime import device, ranks
from megatron.sft.runtime.errors import UserError
from megatron.sft.training.engine import Engine
from megatron.sft.training.state import run_manifest, run_pieces

# Of all saves of this process: what was said of one must not be taken for another's.
_save_numbers = itertools.count(1)


class Saver:
    """Writes the checkpoints of one run. Every rank calls the same methods in the same order.

    `last_saved` is the iteration of the newest checkpoint that is whole on disk, None before the first of this process; set it
    after resuming, so that nothing is saved twice.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.last_saved: int | None = None
        self._options = engine.plan.options
        self._root = self._options.save
        self._staging = Staging()
        self._preparation: Preparation | None = None
        self._job: Job | None = None
        self._exchange: Exchange | None = None
        self._polls = 0
        # Files are compared by checksums of their own; torch's would be computed beside them.
        torch.serialization.set_crc32_options(False)
        if ranks.is_rank_0() and self._root.is_dir():
            clear_leftovers(self._root)

    def save(self, iteration: int, consumed_rows: int) -> None:
        """Write a checkpoint, or begin to if saving is asynchronous; waits for one that is still being written.

        A `UserError` on every rank where it cannot be written; the tracker and the checkpoints before stay good.
        """
        self.finish()
        if self.last_saved == iteration:
            return
        if self._preparation is not None:
            self._preparation.wait()
        started = time.monotonic()
        with self.engine.gathered_parameters():
            pieces = run_pieces(self.engine)
            staged = self._begin(iteration, pieces)
            manifest = run_manifest(self.engine, consumed_rows)
            if staged:
                pieces = self._staging.copy(pieces)
            number = next(_save_numbers)
            self._exchange = Exchange(number)
            timeout = 60 * self._options.distributed_timeout_minutes
            kept = self._options.keep_last, self._options.keep_every
            self._job = Job(self._root, iteration, pieces, manifest, *kept, Exchange(number), timeout)
            self._job.start(started)
            self._job.stood_still = time.monotonic() - started
            if not staged:
                self.finish()

    def poll(self) -> None:
        """Call after every step: takes note of a save that ended meanwhile. A `UserError` on every rank if it failed."""
        self._polls += 1
        if self._polls == 1 and self._options.async_save:
            # Memory takes time to get, page-locked memory seconds; the first save would stand still for it.
            pieces = run_pieces(self.engine)
            if _has_memory(self._staging, pieces):
                self._preparation = Preparation(self._staging, pieces)
        if self._job is None:
            return
        outcome = self._look()
        # Ranks are never more than a step apart, so all of them have seen by the next poll what the first announces now.
        if outcome is not None and outcome.poll <= self._polls:
            self._conclude(outcome)

    def finish(self) -> None:
        """Wait for the running save, if there is one; as `poll` if it failed. Call it at every exit that can be caught."""
        while self._job is not None:
            outcome = self._look()
            if outcome is not None:
                self._conclude(outcome)
            else:
                time.sleep(0.01)

    def _begin(self, iteration: int, pieces: list[Piece]) -> bool:
        """Make an empty folder if the disk has room. Returns whether the state can be copied first, alike on all ranks."""
        num_bytes = sum(piece.num_bytes for piece in pieces)
        facts = torch.tensor(
            [num_bytes, not self._options.async_save or not _has_memory(self._staging, pieces)],
            dtype=torch.float64,
            device=device.current(),
        )
        torch.distributed.all_reduce(facts)
        total, lacking = (int(number) for number in facts.tolist())
        verdict: list[str | None] = [None]
        if ranks.is_rank_0():
            try:
                self._root.mkdir(parents=True, exist_ok=True)
                clear_leftovers(self._root)
                check_room(self._root, total, iteration)
                unfinished_path(self._root, iteration).mkdir()
            except (UserError, OSError) as error:
                verdict = [str(error)]
        torch.distributed.broadcast_object_list(verdict, src=0)
        if verdict[0] is not None:
            raise UserError(f"nothing was written of iteration {iteration}: {verdict[0]}{self._what_is_left()}")
        if self.last_saved is None:
            self._foresee(iteration, total)
        if lacking and self._options.async_save and self.last_saved is None:
            ranks.print_rank_0(
                "the state is saved while training waits: a copy of it does not fit into the CPU's memory"
            )
        return not lacking

    def _foresee(self, iteration: int, num_bytes: int) -> None:
        """Say at the first save if the disk has no room for all that are to come."""
        options, saves = (
            self._options,
            math.ceil((self.engine.plan.train_iters - iteration) / self._options.save_interval),
        )
        # One more than are kept is there while it is written.
        count = min(saves, options.keep_last or saves) + 1
        free = shutil.disk_usage(self._root).free if ranks.is_rank_0() else 0
        if ranks.is_rank_0() and count * num_bytes > free:
            ranks.print_rank_0(
                f"warning: {count} checkpoints of {num_bytes / 1e9:.2f} GB do not fit into the {free / 1e9:.2f} GB that "
                f"{self._root} has free: set KEEP_LAST to a smaller number, or make room before they are written"
            )

    def _look(self) -> Outcome | None:
        """How the running save ended, once the first process has announced it."""
        assert self._job is not None and self._exchange is not None
        self._job.report_death()
        text = self._exchange.get("outcome")
        if text is None and ranks.is_rank_0() and self._job.outcome is not None:
            text = json.dumps({**self._job.outcome, "poll": self._polls + 1})
            self._exchange.put("outcome", text)
        return None if text is None else Outcome(**json.loads(text))

    def _conclude(self, outcome: Outcome) -> None:
        job, self._job = self._job, None
        assert job is not None
        job.cancel()
        if outcome.error:
            if ranks.is_rank_0():
                shutil.rmtree(unfinished_path(self._root, job.iteration), ignore_errors=True)
            raise UserError(
                f"the checkpoint of iteration {job.iteration} was not written: {outcome.error}{self._what_is_left()}"
            )
        self.last_saved = job.iteration
        still = f", training stood still for {job.stood_still:.1f} s" if job.stood_still < 0.9 * outcome.seconds else ""
        ranks.print_rank_0(f"saved {iteration_path(self._root, job.iteration)} in {outcome.seconds:.1f} s{still}")
        for note in outcome.notes:
            ranks.print_rank_0(note)

    def _what_is_left(self) -> str:
        kept = f"; iteration {self.last_saved} is kept" if self.last_saved else ""
        return f"{kept} (mend it, then run the same command)"


def _has_memory(staging: Staging, pieces: list[Piece]) -> bool:
    """Whether a copy of the state fits into this machine's memory, with as much for each of its other processes."""
    if staging.fits(pieces):
        return True
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    return staged_bytes(pieces) * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < 0.8 * available
