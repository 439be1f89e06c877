"""Training: one process of a run. `bash scripts/4_train.sh [train|resume]`, with settings in shell variables, starts

torchrun --nproc-per-node N -m megatron.sft.train [train|resume] --load CKPT --data-path PREFIX --save OUT …
"""

import contextlib
import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace

from megatron.sft.planning.options import TrainOptions, parse
from megatron.sft.runtime import console, ranks, watchdog
from megatron.sft.runtime.errors import UserError, cause_of, first_line, run
from megatron.sft.runtime.signals import LOST_PEER, RESUME, StopRequest, name_of

# What gloo and the store say when the process at the other end has died: an effect; the cause is reported by that process.
_LOST_PEER = re.compile(r"Connection (closed|reset) by|Broken pipe|Connection refused|recvValue failed")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> int:
    stop = StopRequest()
    arguments = list(sys.argv[1:] if argv is None else argv)
    mode, options = parse(arguments)
    console.fall_back_to(options.save / console.FILE)
    watchdog.start(options.watchdog_minutes)
    try:
        status = _train(mode, options, arguments, stop)
    except BaseException as error:
        ranks.end_line()
        if not _LOST_PEER.search(str(error)):
            watchdog.report_failure(f"rank {os.environ.get('RANK', '0')}: {cause_of(error)}")
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            place = error.filename or f"OUTPUT_PATH {options.save}"
            raise UserError(f"{error.strerror}: {place}: check the disk or free space, then run the same command") from error
        if type(error).__name__ == "OutOfMemoryError":
            raise UserError(
                f"the GPU's memory is full in {watchdog.current_part()} ({cause_of(error)}): take RECOMPUTE=auto, more GPUs, "
                "or a larger TENSOR_PARALLEL_SIZE; tools/plan suggests sizes that fit"
            ) from error
        raise
    watchdog.stop()
    return status


def _train(mode: str, options: TrainOptions, arguments: Sequence[str], stop: StopRequest) -> int:
    """Run in this process until the end, or until `stop` is asked for; returns the exit status."""
    # Imported here: torch takes seconds, and signals are listened to from the first moment.
    import torch

    from megatron.sft.model import process_groups
    from megatron.sft.planning import input_checks
    from megatron.sft.planning.plan_text import name_without_effect, setting_lines, table
    from megatron.sft.planning.resolution import resolve
    from megatron.sft.runtime import device, output_lock

    device.prepare()
    found = resolve(mode, options, num_processes=int(os.environ.get("WORLD_SIZE", "1")))
    name_without_effect(found, os.environ)
    plan = found.plan()
    ranks.print_rank_0(table([*found.lines, ("output", str(options.save)), *setting_lines(options, arguments)]))
    input_checks.check(plan)
    writes = mode != "reference" and ranks.is_rank_0()
    hold = output_lock.held(options.save, options.save / ".lock") if writes else contextlib.nullcontext()
    from megatron.sft.model.config import describe_kernels

    ranks.print_rank_0(f"  computing with {describe_kernels(options.precision)}")
    with hold, process_groups.parallel(plan.layout, options.seed, options.distributed_timeout_minutes):
        from megatron.sft.checkpoint.verification import checked_run
        from megatron.sft.training import same_run
        from megatron.sft.training.loop import Run
        from megatron.sft.training.reference import StoppedError, with_logps

        if plan.resume and options.verify_checkpoint:
            plan = replace(plan, start=checked_run(plan.start))
        if plan.resume:
            same_run.check_same_run(plan.start, plan)
        if plan.reference:
            if mode == "reference" and plan.reference.logps:
                ranks.print_rank_0(f"nothing to do: {plan.reference.words}")
            try:
                plan = replace(plan, reference=with_logps(plan, stop))
            except StoppedError as error:
                why = name_of(error.args[0])
                ranks.print_rank_0(f"stopped by {why}: the same command continues from there (status {RESUME})")
                return RESUME
        if mode == "reference":
            return 0
        run: Run | None = None
        try:
            run = Run(plan, stop)
            return run.train()
        except torch.OutOfMemoryError as error:
            from megatron.sft.training.steering.out_of_memory import out_of_memory_text

            engine, part = run.engine if run else None, watchdog.current_part()
            raise UserError(out_of_memory_text(plan, engine, part, first_line(error))) from error


def _end() -> None:
    """Run `main`, and after an error exit without waiting for threads and connections that it has left hanging."""
    try:
        run(main, under_torchrun=True)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        status = LOST_PEER if _LOST_PEER.search(str(error)) else 1
        if status == 1:
            traceback.print_exc()
        else:
            # On this machine the launcher knows the cause and ends this process; on another one the watchdog hears it.
            time.sleep(5)
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)


if __name__ == "__main__":
    _end()
