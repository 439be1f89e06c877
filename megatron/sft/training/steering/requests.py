"""What a user asks of a run by files in its folder: `touch OUTPUT_PATH/save-now` or `stop-now`."""

import os
import time
from pathlib import Path

from megatron.sft.runtime import ranks
from megatron.sft.runtime.signals import STARTED

SAVE_NOW, STOP_NOW = "save-now", "stop-now"
# What stop-now is renamed to, so that a SLURM job knows that it must not be requeued; gone with the next start.
STOPPED = "stopped-by-request"
_PAUSE_SECONDS = 1.0  # shared file systems answer slowly


class Requests:
    """Looks for the files, on rank 0 only. A file from before the start of the run was meant for an earlier one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._next = 0.0
        self._taken: dict[str, int] = {}  # time of change of a file that was taken and could not be removed
        if not ranks.is_rank_0():
            return
        (folder / STOPPED).unlink(missing_ok=True)
        started = float(os.environ.get(STARTED, time.time()))
        for name in (SAVE_NOW, STOP_NOW):
            changed = self._changed(name)
            if changed is not None and changed / 1e9 < int(started):
                self._taken[name] = changed
                self._remove(name)
                ranks.print_rank_0(f"note: {folder / name} is from before this start and has no effect")

    def look(self) -> tuple[bool, bool]:
        """Whether to save, and whether to stop."""
        if not ranks.is_rank_0() or time.monotonic() < self._next:
            return False, False
        self._next = time.monotonic() + _PAUSE_SECONDS
        return self._take(SAVE_NOW), self._take(STOP_NOW)

    def _take(self, name: str) -> bool:
        changed = self._changed(name)
        if changed is None or self._taken.get(name) == changed:
            return False
        self._taken[name] = changed
        self._remove(name)
        return True

    def _changed(self, name: str) -> int | None:
        try:
            return (self._folder / name).stat().st_mtime_ns
        except OSError:
            return None

    def _remove(self, name: str) -> None:
        try:
            if name == STOP_NOW:
                (self._folder / name).replace(self._folder / STOPPED)
            else:
                (self._folder / name).unlink()
        except OSError as error:
            ranks.print_rank_0(f"warning: {self._folder / name} cannot be removed ({error.strerror}): it counts once")
