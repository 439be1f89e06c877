"""The watchdog: a thread in every process that knows which part of which step it is in, says so to the others, and ends a
run that stands still, with one line that names the process and the part.
"""

import contextlib
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

# The exit status of a process that the watchdog ended: timeout(1)'s.
HUNG = 124
# Where the first failure's reason is kept in the store that torchrun's processes share.
FAILED = "megatron-sft/failed"
# A process whose watchdog is silent for so long is stopped, dead, or out of reach. Only looked at while this one waits.
SILENT_SECONDS = 30.0
_WAITING_SECONDS = 5.0
# Start-up, saves and the first step, in which kernels are compiled, may take so many times as long as any other part.
PATIENCE = {"start-up": 3.0, "save": 3.0}
_FIRST_STEP_PATIENCE = 3.0


@dataclass(frozen=True)
class Beat:
    """What a process last said of itself.

    count: grows by one a beat. seconds: how long it had stood there. place: the line of this project that it was in. waits:
    whether that line waits for other processes, as far as Python can tell.
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
    """The main thread begins another part, of `iteration` if that is another. Costs a few assignments."""
    if iteration is not None:
        _now.first_iteration = _now.first_iteration or iteration
        _now.iteration = iteration
    _now.part = part
    _now.since = time.monotonic()


def touch() -> None:
    """The part goes on: another micro-batch, another file."""
    _now.since = time.monotonic()


def start(minutes: float) -> None:
    """Watch this process from here on; `minutes` in one part are too long, 0 watches the other processes only."""
    global _running
    _running = Watchdog(minutes * 60 if minutes > 0 else float("inf"))
    _running.start()


def stop() -> None:
    """The process ends in good order: the others need not wait for its beats."""
    if _running is not None:
        _running.finish()


def report_failure(reason: str) -> None:
    """Tell the processes on other machines, whose launchers do not see this one, why this process ends."""
    if _running is not None:
        _running.tell(reason)


class Watchdog(threading.Thread):
    """Beats into the store that torchrun's processes share, and looks at the others' beats while this process waits."""

    def __init__(self, limit_seconds: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.limit = limit_seconds
        self.interval = max(0.2, min(2.0, limit_seconds / 6))
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.main = threading.main_thread().ident
        self._count = 0
        self._ended = threading.Event()
        self._store: Any = None
        self._heard: dict[int, tuple[Beat, float]] = {}  # the others' last beats and when they came

    def run(self) -> None:
        self._store = open_store() if self.world > 1 else None
        last = time.monotonic()
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            if now - last > self.interval + 5.0:
                # This process was stopped itself, perhaps with the whole job: what it knows is stale.
                touch()
                self._heard.clear()
            last = now
            with contextlib.suppress(
                RuntimeError
            ):  # the store is gone: the launcher ends this process, or a peer's error does
                self._beat()
            verdict = self._verdict()
            if verdict:
                self._end(verdict)

    def finish(self) -> None:
        self._ended.set()
        with contextlib.suppress(RuntimeError):
            self._say(Beat(self._count + 1, "done", _now.iteration, 0.0))

    def tell(self, reason: str) -> None:
        with contextlib.suppress(RuntimeError):
            if self._store is not None:
                self._store.compare_set(FAILED, "", reason)

    def _beat(self) -> None:
        self._count += 1
        seconds = time.monotonic() - _now.since
        place = self._place() if seconds > min(_WAITING_SECONDS, self.limit / 2) else ("", False)
        self._say(Beat(self._count, _now.part, _now.iteration, seconds, *place))
        if self._store is not None and self._store.check([FAILED]):
            # On one machine the launcher has the reason from the process itself.
            self._end(self._store.get(FAILED).decode(), status=1)

    def _say(self, beat: Beat) -> None:
        if self._store is not None:
            self._store.set(_key(f"beat/{self.rank}"), json.dumps(vars(beat)))

    def _verdict(self) -> str:
        """Who stands still, if anybody does, in one line."""
        seconds = time.monotonic() - _now.since
        if seconds < min(_WAITING_SECONDS, self.limit):
            self._heard.clear()
            return ""
        if self.world > 1 and self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._listen()
        over = seconds >= self.limit * self._patience()
        for rank, (beat, when) in self._heard.items():
            quiet = time.monotonic() - when
            if beat.part != "done" and quiet > (max(5.0, 4 * self.interval) if over else SILENT_SECONDS):
                return f"rank {rank} gives no sign of life for {quiet:.0f} s: it was last in {beat}"
        if not over:
            return ""
        beats = {rank: beat for rank, (beat, _) in self._heard.items() if beat.part != "done"}
        beats[self.rank] = Beat(self._count, _now.part, _now.iteration, seconds, *self._place())
        return describe_stall(beats)

    def _patience(self) -> float:
        first = _FIRST_STEP_PATIENCE if _now.iteration == _now.first_iteration else 1.0
        return max(first, PATIENCE.get(_now.part, 1.0))

    def _listen(self) -> None:
        others = [rank for rank in range(self.world) if rank != self.rank]
        known = [rank for rank in others if self._store.check([_key(f"beat/{rank}")])]
        for rank in known:
            beat = Beat(**json.loads(self._store.get(_key(f"beat/{rank}"))))
            if rank not in self._heard or self._heard[rank][0].count != beat.count:
                self._heard[rank] = (beat, time.monotonic())

    def _place(self) -> tuple[str, bool]:
        """The innermost line of this project that the main thread is in, and whether it called torch.distributed."""
        frame, waits = sys._current_frames().get(self.main or 0), False
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            waits = waits or path.parts[-3:-1] == ("torch", "distributed")
            if "sft" in path.parts[-3:-1]:
                return f"{path.name}:{frame.f_lineno}", waits
            frame = frame.f_back
        return "", waits

    def _end(self, verdict: str, status: int = HUNG) -> None:
        from megatron.sft.runtime.errors import leave_message

        if self._store is not None:
            # All of them say what the first one found.
            with contextlib.suppress(RuntimeError):
                found = self._store.compare_set(_key("verdict"), "", verdict)
                verdict = found.decode() or verdict
        leave_message(verdict)
        os._exit(status)


def describe_stall(beats: dict[int, Beat]) -> str:
    """One line about processes of which none makes progress: the one that is furthest behind holds up the others, and of those
    that are equally far one that does not wait for another, or the one that got there first."""
    behind = min(beats, key=lambda rank: (beats[rank].iteration, beats[rank].waits, -beats[rank].seconds))
    line = f"rank {behind} stands still for {beats[behind].seconds:.0f} s in {beats[behind]}"
    waiting = [f"rank {rank} in {beat}" for rank, beat in sorted(beats.items()) if rank != behind]
    more = f" and {len(waiting) - 3} more" if len(waiting) > 3 else ""
    return line + (f"; waiting: {'; '.join(waiting[:3])}{more}" if waiting else "")


def open_store(address: str | None = None, port: int | None = None, seconds: float = 300.0) -> Any:
    """A connection of its own to the store that torchrun's processes meet at; None without one within so many seconds."""
    from torch.distributed import TCPStore

    address, port = address or os.environ.get("MASTER_ADDR"), port or int(os.environ.get("MASTER_PORT", "0"))
    if not address or not port:
        return None
    try:
        return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError):
        return None


def _key(name: str) -> str:
    return f"megatron-sft/{name}"
