"""Signals and the wall-clock limit: what asks a run to save and end. Needs no torch, so that it listens from the first moment.

A first signal asks for a checkpoint after the current step; a second one ends the process immediately. While a run starts there
is nothing to save, and the first signal ends it.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NoReturn

# The exit status of a run that was asked to end, has saved and can be continued: sysexits.h's EX_TEMPFAIL.
RESUME = 75
# Of a process whose connection to another one broke: that one is the cause. sysexits.h's EX_PROTOCOL.
LOST_PEER = 76
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# The launcher passes a signal on as this one, so that a signal that went to both counts once.
PASSED_ON = signal.SIGUSR2
LAUNCHER_PID = "MEGATRON_SFT_LAUNCHER_PID"
STARTED = "MEGATRON_SFT_STARTED"
_TIME_LIMIT = 1000
STOP_FILE = 1001  # a code as those of StopRequest: the file stop-now
_PR_SET_PDEATHSIG = 1


class Listener:
    """Calls `act(number)` in a separate thread for every signal, even while the main thread waits inside a library."""

    def __init__(self, numbers: Iterable[signal.Signals], act: Callable[[signal.Signals], None]) -> None:
        # What nohup, or a script's `&`, has this process ignore stays ignored.
        self._numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        self._act = act
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self.claim()
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def claim(self) -> None:
        """Take the signals, again after torchrun has installed its own handlers."""
        for number in self._numbers:
            signal.signal(number, lambda *_: None)

    def _listen(self) -> None:
        while True:
            for number in self._reader.recv(16):
                if number in self._numbers:
                    self._act(signal.Signals(number))


def end_now(status: int, message: str = "") -> NoReturn:
    """End this process from any thread, whatever the others do."""
    if message:
        print(message, file=sys.stderr, flush=True)
    os._exit(status)


class StopRequest:
    """What this process has been asked, from the first moment on. `begin` says that there is something to save."""

    def __init__(self) -> None:
        self._counts: Counter[bool] = Counter()
        self._number = 0
        self._starting = True
        self._leaving = False
        self._deadline = float("inf")
        Listener((*STOP_SIGNALS, PASSED_ON), self._take)
        _end_with_launcher()

    def _take(self, number: signal.Signals) -> None:
        if self._leaving:
            return
        passed_on = number == PASSED_ON
        self._counts[passed_on] += 1
        if self._starting:
            speaks = not passed_on or os.environ.get("RANK", "0") == "0"
            end_now(RESUME, f"stopped by {name_of(number)} before the first step: nothing to save" if speaks else "")
        if self._counts[passed_on] > 1:
            end_now(128 + (signal.SIGTERM if passed_on else number), "" if passed_on else f"ended immediately by {number.name}")
        # The signal's own name says more than the launcher's.
        if not self._number or not passed_on:
            self._number = int(number)

    def begin(self, exit_after_minutes: float) -> None:
        """From here on a first signal waits for the next step border. The limit counts from the launcher's start; 0 is none."""
        if exit_after_minutes > 0:
            self._deadline = float(os.environ.get(STARTED, time.time())) + 60 * exit_after_minutes
        self._starting = False

    def code(self, reserve_seconds: float) -> int:
        """0, or why this process wants to end: a signal's number, or that the time limit comes within `reserve_seconds`."""
        if self._number:
            return self._number
        return _TIME_LIMIT if time.time() + reserve_seconds >= self._deadline else 0

    def leave(self) -> None:
        """Everything is saved: signals, torchrun's own to the slower ranks among them, change nothing any more."""
        self._leaving = True


def name_of(code: int) -> str:
    """A stop's reason in words."""
    if code == _TIME_LIMIT:
        return "EXIT_AFTER_MINUTES"
    if code == STOP_FILE:
        return "stop-now"
    return "a signal to the launcher" if code == PASSED_ON else signal.Signals(code).name


def _end_with_launcher() -> None:
    """So that half a run does not continue to write when the launcher is killed."""
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is not None:
        end_with_parent(int(launcher))


def end_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent, the process `parent`, ends, however that happens. Linux only."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel knew
        os._exit(128 + signal.SIGKILL)


class SignalRelay:
    """Signals to the launcher: with no processes yet the first one ends it, else they are passed on."""

    def __init__(self) -> None:
        self.pass_on: Callable[[signal.Signals], None] | None = None
        self.starting = threading.Lock()  # held while processes are being started: they get the signal afterwards
        self.listener = Listener(STOP_SIGNALS, self._take)

    def _take(self, number: signal.Signals) -> None:
        with self.starting:
            if self.pass_on is None:
                end_now(RESUME, f"stopped by {number.name} before the first process started")
            self.pass_on(number)
