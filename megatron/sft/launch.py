"""Start the processes of a distributed run with torchrun, pass signals on to them, and say in one line what ended them.

The options are torchrun's own: `python -m megatron.sft.launch --standalone --nproc-per-node 4 -m megatron.sft.train …`
Exit status: the processes' own; docs/reliability.md lists them.
"""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from megatron.sft.signals import LAUNCHER_PID, RESUME, STARTED, STOP_SIGNALS, Listener, end_now


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


def main() -> None:
    relay = SignalRelay()
    os.environ[LAUNCHER_PID] = str(os.getpid())
    os.environ.setdefault(STARTED, str(time.time()))
    # Imported here: torch takes seconds, and signals are listened to from the first moment.
    from megatron.sft.agent import launch

    # Without a folder of its own torchrun leaves one in /tmp for every run.
    with tempfile.TemporaryDirectory(prefix="megatron-sft-") as logs:
        status = launch(["--log-dir", logs, *sys.argv[1:]], relay)
    sys.exit(status)


if __name__ == "__main__":
    main()
