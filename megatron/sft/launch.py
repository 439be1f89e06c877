"""Start the processes of a distributed run with torchrun, pass signals on to them, and say in one line what ended them.

The options are torchrun's own: `python -m megatron.sft.launch --standalone --nproc-per-node 4 -m megatron.sft.train …`
Exit status: the processes' own; docs/reliability.md lists them.
"""

import os
import sys
import tempfile
import time
from collections.abc import Sequence

from megatron.sft.planning.first_checks import check_first
from megatron.sft.planning.options import parse
from megatron.sft.runtime import console
from megatron.sft.runtime.errors import run
from megatron.sft.runtime.signals import LAUNCHER_PID, STARTED, SignalRelay

TRAIN = "megatron.sft.train"


def check_inputs(arguments: Sequence[str], num_processes: int) -> None:
    """Resolve a training run and compare its inputs with their checksums, once for all processes of this node.

    arguments: of the launcher. Anything but training has nothing to check. What is wrong is a `UserError`.
    """
    if TRAIN not in arguments:
        return
    from megatron.sft.planning import input_checks
    from megatron.sft.planning.resolution import plan_run
    from megatron.sft.training.same_run import check_same_run

    mode, options = parse(arguments[arguments.index(TRAIN) + 1 :])
    plan = plan_run(mode, options, num_processes)
    if plan.resume:
        check_same_run(plan.start, plan)
    input_checks.check(plan)
    os.environ[input_checks.CHECKED] = "1"  # the processes inherit it


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    relay = SignalRelay()
    os.environ[LAUNCHER_PID] = str(os.getpid())
    os.environ.setdefault(STARTED, str(time.time()))
    for name in [name for name in os.environ if name.startswith("PET_")]:
        del os.environ[name]  # defaults of torchrun's options, which PyTorchJob sets: ours come from the command line
    if TRAIN in arguments:
        mode, options = parse(arguments[arguments.index(TRAIN) + 1 :])
        console.fall_back_to(options.save / console.FILE)
        check_first(mode, options)
    # Imported here: torch takes seconds, and signals are listened to from the first moment.
    from megatron.sft.runtime.elastic_agent import launch

    # Without its own folder torchrun leaves one in /tmp for every run.
    with tempfile.TemporaryDirectory(prefix="megatron-sft-") as logs:
        return launch(["--log-dir", logs, *arguments], relay, lambda count: check_inputs(arguments, count))


if __name__ == "__main__":
    run(main)
