"""torchrun's agent on this machine, with this project's ways to end a run: processes get time to save, one that died ends the
others, one that is stopped is noticed, and one line replaces torchrun's forty.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import Any

import torch.distributed.launcher.api as launcher
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import parse_args, run

from megatron.sft.runtime import stores, watchdog
from megatron.sft.runtime.errors import UserError, fail
from megatron.sft.runtime.signals import LOST_PEER, PASSED_ON, RESUME, STOP_SIGNALS, SignalRelay

# A process that has been asked to stop before it listened ends by the signal itself.
_STOPPED = {RESUME, *(-number for number in (*STOP_SIGNALS, PASSED_ON))}
STOPPED_SECONDS = 30.0  # how long a process may be in the state that SIGSTOP leaves it in
_LEAVING_SECONDS = 30.0  # from the first process that exits with RESUME to the last
_SECOND_SIGNAL_SECONDS = 5.0  # from a second signal to SIGKILL


@dataclass
class Launch:
    """What the launcher and the agent, which torchrun makes and discards, share about one run on this machine.

    before_start: called with the number of all processes when the nodes have met and before any process starts; its `UserError`
    ends the run on every node. ended_here: processes that the agent killed because another one failed or hung, whose exit
    statuses are not the root cause. note: the cause, where the agent itself found it.
    """

    relay: SignalRelay
    before_start: Callable[[int], None]
    stop_minutes: float = field(default_factory=lambda: float(os.environ.get("STOP_MINUTES", "30")))
    ended_here: set[int] = field(default_factory=set)
    note: str = ""
    signals: list[signal.Signals] = field(default_factory=list)


class Agent(LocalElasticAgent):
    """torchrun's agent of one machine; `Launch` has what it shares with the launcher."""

    def __init__(self, launch: Launch, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._launch = launch

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        launch = self._launch
        try:
            os.environ["GROUP_RANK"] = str(worker_group.group_rank)
            launch.before_start(worker_group.workers[0].world_size)
        except UserError as error:
            launch.note = str(error)
            self._tell_other_machines()
            raise
        with launch.relay.starting:
            started: dict[int, Any] = super()._start_workers(worker_group)
            self._stopped_seconds: dict[int, float] = {}
            self._looked = time.monotonic()
            launch.relay.pass_on = self._pass_on
            launch.relay.listener.claim()  # a torchrun without `signals_to_handle` has just taken the signals
        return started

    def _running(self) -> dict[int, Popen[bytes]]:
        """Global rank to process, for those that have not ended."""
        handlers = self._pcontext.subprocess_handlers  # type: ignore[union-attr]
        ranks = {worker.local_rank: worker.global_rank for worker in self._worker_group.workers}
        return {ranks[local]: handler.proc for local, handler in handlers.items() if handler.proc.poll() is None}

    def _pass_on(self, number: signal.Signals) -> None:
        self._launch.signals.append(number)
        for process in self._running().values():  # before a line, which a terminal may hold up
            process.send_signal(PASSED_ON)
        if len(self._launch.signals) == 1:
            print(f"{number.name}: the run saves at the next step and ends; a second signal ends it immediately", flush=True)
            self._kill_after(60 * self._launch.stop_minutes)
        else:
            self._kill_after(_SECOND_SIGNAL_SECONDS)

    def _kill_after(self, seconds: float) -> None:
        timer = threading.Timer(seconds, lambda: self._kill(self._running().values()))
        timer.daemon = True
        timer.start()

    def _monitor_workers(self, worker_group: Any) -> Any:
        self._end_if_a_process_is_stopped()
        handlers = self._pcontext.subprocess_handlers.values()  # type: ignore[union-attr]
        statuses = {handler.proc.poll() for handler in handlers} - {None, 0}
        if statuses:
            self._end_others(statuses)
        return super()._monitor_workers(worker_group)

    def _end_others(self, statuses: set[Any]) -> None:
        """When one process has failed, end the rest; torchrun would send SIGTERM and wait 30 s."""
        if statuses <= _STOPPED:
            # They know, or hear it now, and end by themselves.
            if not self._launch.signals:
                for process in self._running().values():
                    process.send_signal(PASSED_ON)
            until = time.monotonic() + _LEAVING_SECONDS
            while self._running() and time.monotonic() < until:
                time.sleep(0.05)
        else:
            self._tell_other_machines()
        self._kill(self._running().values())

    def _kill(self, processes: Iterable[Popen[bytes]]) -> None:
        for process in list(processes):
            self._launch.ended_here.add(process.pid)
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.wait()

    def _end_if_a_process_is_stopped(self) -> None:
        """A process stopped by SIGSTOP cannot report it, and in a run of one process no other process notices."""
        now = time.monotonic()
        if now - self._looked < 1.0:
            return
        # Where this agent was stopped together with the processes, that time does not count.
        seconds, self._looked = min(now - self._looked, 2.0), now
        for rank, process in self._running().items():
            stopped = _state_of(process.pid) == "T"
            self._stopped_seconds[rank] = self._stopped_seconds.get(rank, 0.0) + seconds if stopped else 0.0
            if self._stopped_seconds[rank] >= STOPPED_SECONDS:
                self._launch.note = (
                    f"rank {rank} (process {process.pid}) was stopped, as SIGSTOP does, for {STOPPED_SECONDS:.0f} s"
                )
                self._tell_other_machines()
                self._kill(self._running().values())
                break

    def _failures(self) -> dict[int, ProcessFailure]:
        context: Any = self._pcontext
        failures = {}
        for worker in self._worker_group.workers:
            process = context.subprocess_handlers[worker.local_rank].proc
            if process.poll():
                file = context.error_files[worker.local_rank]
                failures[worker.global_rank] = ProcessFailure(worker.global_rank, process.pid, process.returncode, file)
        return failures

    def _tell_other_machines(self) -> None:
        group: Any = self._worker_group
        if group.group_world_size in (None, 1):
            return
        # The machine of the store may be gone itself.
        store = watchdog.open_store(group.master_addr, group.master_port, seconds=5.0)
        if store is not None:
            reason = self._launch.note or root_cause(self._failures(), self._launch)[1]
            store.compare_set(watchdog.FAILED, "", reason)


def _state_of(pid: int) -> str:
    """The kernel's letter for a process's state, empty if the process does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def root_cause(failures: dict[int, ProcessFailure], launch: Launch) -> tuple[int, str]:
    """The exit status of the process that caused the end, and one line about it; "" if it has said everything itself.

    A process that ends with an exception has printed its trace; one with a `UserError` has left its line in torchrun's error
    file. Processes that die after it of a broken connection are not the cause.
    """
    causes = {rank: failure for rank, failure in failures.items() if failure.pid not in launch.ended_here} or failures
    rank, failure = min(causes.items(), key=lambda item: (_order(item[1]), item[1].timestamp))
    if launch.note:
        return watchdog.HUNG, launch.note
    if failure.exitcode in _STOPPED:
        return RESUME, ""
    if failure.exitcode - 128 in STOP_SIGNALS:
        return failure.exitcode, "ended immediately by a second signal; the last checkpoint is good"
    if failure.exitcode < 0:
        hint = ": often too little memory on this machine" if failure.exitcode == -signal.SIGKILL else ""
        return 128 - failure.exitcode, f"rank {rank} (process {failure.pid}) was ended by {failure.signal_name()}{hint}"
    if failure.exitcode == LOST_PEER:
        return LOST_PEER, f"rank {rank} lost its connection to another process, which has ended or is out of reach"
    message: Any = failure.message
    if isinstance(message, dict) and "message" in message:
        return failure.exitcode, str(message["message"])
    return failure.exitcode, f"rank {rank} ended with status {failure.exitcode}: its messages are above"


def _order(failure: ProcessFailure) -> int:
    """Causes first: a death by signal, a known reason, a request, anything else, a lost connection."""
    if failure.exitcode in _STOPPED:
        return 2
    if failure.exitcode < 0:
        return 0
    if failure.exitcode == LOST_PEER:
        return 4
    message: Any = failure.message
    return 1 if isinstance(message, dict) else 3


def launch(arguments: Sequence[str], relay: SignalRelay, before_start: Callable[[int], None]) -> int:
    """Run torchrun with these arguments and return the exit status of the run.

    A `UserError` of `before_start`, or nodes that did not meet, end the run with status 2.
    """
    if "LOGLEVEL" not in os.environ:
        # torchrun's warnings and its table of failures repeat what the failing process has said.
        logging.disable(logging.ERROR)
    stores.check_libuv()
    state = Launch(relay, before_start)
    api: Any = launcher
    api.LocalElasticAgent = partial(Agent, state)
    try:
        options = parse_args(arguments)
        if str(options.max_restarts) != "0":
            raise UserError(
                f"--max-restarts {options.max_restarts}: a run is not started again by its launcher; run the same command "
                "again, which resumes, or submit it with scripts/cluster/submit.sh, whose jobs requeue themselves"
            )
        options.signals_to_handle = "SIGQUIT"  # the others are the relay's
        run(options)
    except ChildFailedError as error:
        if len(state.signals) > 1:
            print("ended immediately by a second signal; the last checkpoint is good", file=sys.stderr)
            return 128 + state.signals[1]
        status, line = root_cause(error.failures, state)
        if line:
            print(f"error: {line}", file=sys.stderr)
        return status
    except SignalException as error:
        # Between the first process and the last: nothing has begun.
        print(f"stopped by {error.sigval.name} before the first step", file=sys.stderr)
        return RESUME
    except (DistError, RendezvousError) as error:
        reason = str(error).partition("\n")[0]
        fail(f"the nodes did not meet ({reason}): check MASTER_ADDR and MASTER_PORT, or RDZV_ENDPOINT, on every node")
    return 0
