"""Start the processes of a distributed run with torchrun, and when one fails say so in one line instead of torchrun's forty.

The options are torchrun's own: `python -m megatron.sft.launch --standalone --nproc-per-node 4 -m megatron.sft.train …`
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import parse_args, run

from megatron.sft.errors import fail


def failure_status(error: ChildFailedError) -> int:
    """The exit status of the process that failed first; what it has not said itself is said here, in one line.

    A process that ends with an exception has printed its trace. One that ends with a `UserError` has left its line in
    torchrun's error file.
    """
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        hint = ": often too little memory on this machine" if failure.exitcode == -signal.SIGKILL else ""
        print(f"error: rank {rank} (process {failure.pid}) was ended by {failure.signal_name()}{hint}", file=sys.stderr)
        return 128 - failure.exitcode
    message: Any = failure.message
    if isinstance(message, dict) and "message" in message:
        print(f"error: {message['message']}", file=sys.stderr)
    else:
        print(f"error: rank {rank} ended with status {failure.exitcode}: its messages are above", file=sys.stderr)
    return failure.exitcode


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments and return the exit status."""
    if "LOGLEVEL" not in os.environ:
        # torchrun's warnings and its table of failures repeat what the failing process has said.
        logging.disable(logging.ERROR)
    try:
        # Without a folder of its own torchrun leaves one in /tmp for every run.
        with tempfile.TemporaryDirectory(prefix="megatron-sft-") as logs:
            run(parse_args(["--log-dir", logs, *arguments]))
    except ChildFailedError as error:
        return failure_status(error)
    except SignalException as error:
        print(f"stopped by {error.sigval.name}", file=sys.stderr)
        return 128 + error.sigval
    except (DistError, RendezvousError) as error:
        reason = str(error).partition("\n")[0]
        fail(f"the nodes did not meet ({reason}): check MASTER_ADDR and MASTER_PORT, or RDZV_ENDPOINT, on every node")
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
