"""Start the processes of a distributed run with torchrun, pass signals on to them, and say in one line what ended them.

The options are torchrun's own: `python -m megatron.sft.launch --standalone --nproc-per-node 4 -m megatron.sft.train …`
Exit status: the processes' own; docs/reliability.md lists them.
"""

import os
import sys
import tempfile
import time
from collections.abc import Sequence

from megatron.sft.runtime.signals import LAUNCHER_PID, STARTED, SignalRelay


def main(argv: Sequence[str] | None = None) -> int:
    relay = SignalRelay()
    os.environ[LAUNCHER_PID] = str(os.getpid())
    os.environ.setdefault(STARTED, str(time.time()))
    # Imported here: torch takes seconds, and signals are listened to from the first moment.
    from megatron.sft.runtime.elastic_agent import launch

    # Without a folder of its own torchrun leaves one in /tmp for every run.
    with tempfile.TemporaryDirectory(prefix="megatron-sft-") as logs:
        return launch(["--log-dir", logs, *(sys.argv[1:] if argv is None else argv)], relay)


if __name__ == "__main__":
    sys.exit(main())
