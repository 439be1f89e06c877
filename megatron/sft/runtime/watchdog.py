"""The watchdog: a thread in every process that reports to the others which part of which step the process is in, and ends a
run that hangs with one line that names the process and the part.
"""

import contextlib
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.sft.runtime.errors import leave_message

# The exit status of a process that the watchdog ended: what timeout(1) uses.
HUNG = 124
# Key of the first failure's reason in the store that torchrun's processes share.
FAILED = "megatron-sft/failed"
# A process whose watchdog is silent for this long is stopped, dead, or out of reach. Only checked while this process waits.
SILENT_SECONDS = 30.0
_WAITING_SECONDS = 5.0  # in one part, after which this process counts as waiting; most parts take less than a second
# How many times the limit these parts may take, and any part of the first step, in which kernels are compiled.
PATIENCE = {"start-up": 3.0, "save": 3.0}
_FIRST_STEP_PATIENCE = 3.0


@dataclass(frozen=True)
class Beat:
    """A process's last report.

    count: one more in each beat. part: as given to `enter`. seconds: since it entered that part. place: the line of this
    project that it was in, as `file:line`, where it had waited for some seconds. waits: whether that line was in a call of
    torch.distributed, that is, waited for other processes as far as Python can see.
    """

    count: int
    part: str
    iteration: int
    seconds: float
    place: str = ""
    waits: bool = False

    def __str__(self) -> str:
        step = f"iteration {self.iteration}, " if self.iteration else ""
        return f"{step}{self.part}{f' ({self.place})' if self.place else ''}"


@dataclass
class _Now:
    part: str = "start-up"
    iteration: int = 0
    first_iteration: int = 0
    since: float = field(default_factory=time.monotonic)


_now = _Now()
_running: "Watchdog | None" = None


def enter(part: str, iteration: int | None = None) -> None:
    """The main thread begins `part`, of the same iteration if none is given. Called several times a step: a few assignments."""
    if iteration is not None:
        _now.first_iteration = _now.first_iteration or iteration
        _now.iteration = iteration
    _now.part = part
    _now.since = time.monotonic()


def current_part() -> str:
    """What the main thread is doing, as given to `enter`."""
    return _now.part


def touch() -> None:
    """Progress within the part (another micro-batch, another file): start its clock again."""
    _now.since = time.monotonic()


def start(minutes: float) -> None:
    """Start the thread. It ends the run after `minutes` in one part; with 0 only where another process falls silent."""
    global _running
    _running = Watchdog(minutes * 60 if minutes > 0 else float("inf"))
    _running.start()


def stop() -> None:
    """Clean shutdown: the others stop expecting beats from this rank."""
    if _running is not None:
        _running.finish()


def report_failure(reason: str) -> None:
    """Give the processes on other machines, whose launchers do not see this one, the reason why this process ends."""
    if _running is not None:
        _running.report_failure(reason)


class Watchdog(threading.Thread):
    """Writes beats to the store that torchrun's processes share, and reads the others' beats while this process waits."""

    def __init__(self, limit_seconds: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.limit = limit_seconds
        self.interval = max(0.2, min(2.0, limit_seconds / 6))
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.main = threading.main_thread().ident
        self._count = 0
        self._finished = threading.Event()
        self._store: Any = None
        self._heard: dict[int, tuple[Beat, float]] = {}  # rank to its last beat and when that arrived

    def run(self) -> None:
        self._store = open_store() if self.world > 1 else None
        last = time.monotonic()
        while not self._finished.wait(self.interval):
            now = time.monotonic()
            if now - last > self.interval + 5.0:
                # This process was stopped itself, perhaps with the whole job: what it has heard is stale.
                touch()
                self._heard.clear()
            last = now
            # Without the store, which is gone by then, the launcher ends this process, or a peer's error does.
            with contextlib.suppress(RuntimeError):
                self._beat()
            if verdict := self._verdict():
                self._end(verdict)

    def finish(self) -> None:
        self._finished.set()
        with contextlib.suppress(RuntimeError):
            self._write(Beat(self._count + 1, "done", _now.iteration, 0.0))

    def report_failure(self, reason: str) -> None:
        with contextlib.suppress(RuntimeError):
            if self._store is not None:
                self._store.compare_set(FAILED, "", reason)

    def _beat(self) -> None:
        self._count += 1
        seconds = time.monotonic() - _now.since
        place = self._place() if seconds > min(_WAITING_SECONDS, self.limit / 2) else ("", False)
        self._write(Beat(self._count, _now.part, _now.iteration, seconds, *place))
        if self._store is not None and self._store.check([FAILED]):
            # From another machine; on this one the launcher has the reason from the process itself.
            self._end(self._store.get(FAILED).decode(), status=1)

    def _write(self, beat: Beat) -> None:
        if self._store is not None:
            self._store.set(_key(f"beat/{self.rank}"), json.dumps(vars(beat)))

    def _verdict(self) -> str:
        """One line on the process that hangs, empty if none does."""
        seconds = time.monotonic() - _now.since
        if seconds < min(_WAITING_SECONDS, self.limit):
            self._heard.clear()
            return ""
        if self.world > 1 and self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._read_beats()
        over = seconds >= self.limit * self._patience()
        for rank, (beat, when) in self._heard.items():
            quiet = time.monotonic() - when
            # Where the run ends anyway, two missed beats are enough to name that process.
            if beat.part != "done" and quiet > (_WAITING_SECONDS if over else SILENT_SECONDS):
                return f"rank {rank} has been silent for {quiet:.0f} s, last in {beat}"
        if not over:
            return ""
        beats = {rank: beat for rank, (beat, _) in self._heard.items() if beat.part != "done"}
        beats[self.rank] = Beat(self._count, _now.part, _now.iteration, seconds, *self._place())
        return describe_stall(beats)

    def _patience(self) -> float:
        first = _FIRST_STEP_PATIENCE if _now.iteration == _now.first_iteration else 1.0
        return max(first, PATIENCE.get(_now.part, 1.0))

    def _read_beats(self) -> None:
        others = [rank for rank in range(self.world) if rank != self.rank]
        known = [rank for rank in others if self._store.check([_key(f"beat/{rank}")])]
        for rank in known:
            beat = Beat(**json.loads(self._store.get(_key(f"beat/{rank}"))))
            if rank not in self._heard or self._heard[rank][0].count != beat.count:
                self._heard[rank] = (beat, time.monotonic())

    def _place(self) -> tuple[str, bool]:
        """The innermost line of this project that the main thread is in, and whether it is in a call of torch.distributed."""
        frame, waits = sys._current_frames().get(self.main or 0), False
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            waits = waits or path.parts[-3:-1] == ("torch", "distributed")
            if "sft" in path.parts[-4:-1]:  # ROOM/FOLDER/file.py at most
                return f"{path.name}:{frame.f_lineno}", waits
            frame = frame.f_back
        return "", waits

    def _end(self, verdict: str, status: int = HUNG) -> None:
        if self._store is not None:
            # Processes that find it at the same time all report what the first one found.
            with contextlib.suppress(RuntimeError):
                found = self._store.compare_set(_key("verdict"), "", verdict)
                verdict = found.decode() or verdict
        leave_message(verdict)
        os._exit(status)


def describe_stall(beats: dict[int, Beat]) -> str:
    """One line on processes of which none makes progress, by rank. Blamed is the one in the earliest iteration; of several
    there one that does not wait for another process, and of those the process that has been there longest."""
    behind = min(beats, key=lambda rank: (beats[rank].iteration, beats[rank].waits, -beats[rank].seconds))
    line = f"rank {behind} hung for {beats[behind].seconds:.0f} s in {beats[behind]}"
    waiting = [f"rank {rank} in {beat}" for rank, beat in sorted(beats.items()) if rank != behind]
    more = f" and {len(waiting) - 3} more" if len(waiting) > 3 else ""
    return line + (f"; waiting: {'; '.join(waiting[:3])}{more}" if waiting else "")


def open_store(address: str | None = None, port: int | None = None, seconds: float = 300.0) -> Any:
    """A new connection to the store at which torchrun's processes meet; None if there is none within `seconds`.

    A shared connection would not do: another thread's blocking call holds it up. Address and port default to torchrun's.
    """
    from megatron.sft.runtime import stores  # it imports torch

    address, port = address or os.environ.get("MASTER_ADDR"), port or int(os.environ.get("MASTER_PORT", "0"))
    if not address or not port:
        return None
    try:
        return stores.connect(address, port, seconds)
    except (RuntimeError, ValueError):
        return None


def _key(name: str) -> str:
    return f"megatron-sft/{name}"
