"""torchrun's agent on this machine, with the ways of this project to end a run: it gives the processes time to save, ends the
others when one has died, notices one that is stopped, and prints one line instead of torchrun's forty.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch.distributed.launcher.api as launcher
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import parse_args, run

from megatron.sft.runtime import watchdog
from megatron.sft.runtime.errors import fail
from megatron.sft.runtime.signals import LOST_PEER, PASSED_ON, RESUME, STOP_SIGNALS

if TYPE_CHECKING:
    from megatron.sft.runtime.signals import SignalRelay

# A process that has been asked to stop before it listened ends by the signal itself.
_STOPPED = {RESUME, *(-number for number in (*STOP_SIGNALS, PASSED_ON))}
# What another start would not change: a user's mistake, a request to end.
_FINAL = {2, *_STOPPED, *(128 + number for number in STOP_SIGNALS)}
STOPPED_SECONDS = 30.0  # a process in the state that SIGSTOP leaves it in
_LEAVING_SECONDS = 30.0  # from the first process that says RESUME to the last
_AT_ONCE_SECONDS = 5.0  # from a second signal to the end


class Agent(LocalElasticAgent):
    """What `launch` reads afterwards is kept on the class, because torchrun makes the object and throws it away."""

    relay: ClassVar["SignalRelay"]
    stop_minutes: ClassVar[float]
    # Processes that this agent ended because another had failed, or stood still: their deaths are no causes.
    ended_here: ClassVar[set[int]] = set()
    note: ClassVar[str] = ""
    signals: ClassVar[list[signal.Signals]] = []

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        with Agent.relay.starting:
            started: dict[int, Any] = super()._start_workers(worker_group)
            self._frozen: dict[int, float] = {}
            self._looked = time.monotonic()
            Agent.relay.pass_on = self._pass_on
            Agent.relay.listener.claim()  # a torchrun without `signals_to_handle` has just taken the signals
        return started

    def _running(self) -> dict[int, Any]:
        """Global rank to process, of those that have not ended."""
        handlers = self._pcontext.subprocess_handlers  # type: ignore[union-attr]
        ranks = {worker.local_rank: worker.global_rank for worker in self._worker_group.workers}
        return {ranks[local]: each.proc for local, each in handlers.items() if each.proc.poll() is None}

    def _pass_on(self, number: signal.Signals) -> None:
        Agent.signals.append(number)
        if len(Agent.signals) == 1:
            print(
                f"{number.name}: the run saves at the next step and ends; a second signal ends it at once", flush=True
            )
            self._remaining_restarts = 0
            self._end_later(60 * self.stop_minutes)
        else:
            self._end_later(_AT_ONCE_SECONDS)
        for process in self._running().values():
            process.send_signal(PASSED_ON)

    def _end_later(self, seconds: float) -> None:
        timer = threading.Timer(seconds, lambda: self._kill(self._running().values()))
        timer.daemon = True
        timer.start()

    def _monitor_workers(self, worker_group: Any) -> Any:
        self._look_for_frozen()
        handlers = self._pcontext.subprocess_handlers.values()  # type: ignore[union-attr]
        statuses = {each.proc.poll() for each in handlers} - {None, 0}
        if statuses:
            if statuses & _FINAL:
                self._remaining_restarts = 0
            self._end_others(statuses)
            if self._remaining_restarts > 0:
                self._announce_restart()
        return super()._monitor_workers(worker_group)

    def _end_others(self, statuses: set[Any]) -> None:
        """When one process has failed, end the rest; torchrun would ask them kindly for 30 s."""
        if statuses <= _STOPPED:
            # They know, or are told now, and end by themselves.
            if not Agent.signals:
                for process in self._running().values():
                    process.send_signal(PASSED_ON)
            until = time.monotonic() + _LEAVING_SECONDS
            while self._running() and time.monotonic() < until:
                time.sleep(0.05)
        else:
            self._tell_other_machines()
        self._kill(self._running().values())

    def _kill(self, processes: Any) -> None:
        for process in list(processes):
            Agent.ended_here.add(process.pid)
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.wait()

    def _look_for_frozen(self) -> None:
        """A stopped process cannot speak for itself."""
        now = time.monotonic()
        if now - self._looked < 1.0:
            return
        # Where this agent was stopped with the others, the time does not count.
        seconds, self._looked = min(now - self._looked, 2.0), now
        for rank, process in self._running().items():
            stopped = _state_of(process.pid) == "T"
            self._frozen[rank] = self._frozen.get(rank, 0.0) + seconds if stopped else 0.0
            if self._frozen[rank] >= STOPPED_SECONDS:
                Agent.note = (
                    f"rank {rank} (process {process.pid}) was stopped, as SIGSTOP does, for {STOPPED_SECONDS:.0f} s"
                )
                self._tell_other_machines()
                self._kill(self._running().values())
                break

    def _failures(self) -> list[ProcessFailure]:
        context: Any = self._pcontext
        failures = []
        for worker in self._worker_group.workers:
            process = context.subprocess_handlers[worker.local_rank].proc
            if process.poll():
                file = context.error_files[worker.local_rank]
                failures.append(ProcessFailure(worker.global_rank, process.pid, process.returncode, file))
        return failures

    def _tell_other_machines(self) -> None:
        group: Any = self._worker_group
        if group.group_world_size in (None, 1):
            return
        # The machine of the store may be the one that is gone.
        store = watchdog.open_store(group.master_addr, group.master_port, seconds=5.0)
        if store is not None:
            attempt = group.spec.max_restarts - self._remaining_restarts
            reason = Agent.note or status_and_cause({failure.local_rank: failure for failure in self._failures()})[1]
            store.compare_set(f"megatron-sft/{attempt}/failed", "", reason)

    def _announce_restart(self) -> None:
        reason = status_and_cause({failure.local_rank: failure for failure in self._failures()})[1]
        print(f"{reason}; starting again from the last checkpoint ({self._remaining_restarts - 1} more)", flush=True)
        Agent.note = ""


def _state_of(pid: int) -> str:
    """The kernel's letter for a process's state, empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def status_and_cause(failures: dict[int, ProcessFailure]) -> tuple[int, str]:
    """The exit status of the process that is the cause, and one line on it; "" where it has said everything itself.

    A process that ends with an exception has printed its trace; one with a `UserError` has left its line in torchrun's error
    file. What dies after it of a broken connection is no cause.
    """
    causes = {rank: each for rank, each in failures.items() if each.pid not in Agent.ended_here} or failures
    rank, failure = min(causes.items(), key=lambda item: (_order(item[1]), item[1].timestamp))
    if Agent.note:
        return watchdog.HUNG, Agent.note
    if failure.exitcode in _STOPPED:
        return RESUME, ""
    if failure.exitcode - 128 in STOP_SIGNALS:
        return failure.exitcode, "ended at once by a second signal; the last checkpoint is good"
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
    """Causes first: a death by signal, a known reason, a request, anything else."""
    if failure.exitcode in _STOPPED:
        return 2
    if failure.exitcode < 0:
        return 0
    if failure.exitcode == LOST_PEER:
        return 4
    message: Any = failure.message
    return 1 if isinstance(message, dict) else 3


def launch(arguments: Sequence[str], relay: "SignalRelay") -> int:
    """Run torchrun with these arguments and return the exit status."""
    if "LOGLEVEL" not in os.environ:
        # torchrun's warnings and its table of failures repeat what the failing process has said.
        logging.disable(logging.ERROR)
    Agent.relay, Agent.stop_minutes = relay, float(os.environ.get("STOP_MINUTES", "30"))
    api: Any = launcher
    api.LocalElasticAgent = Agent
    try:
        options = parse_args(arguments)
        options.signals_to_handle = "SIGQUIT"  # the others are the relay's
        run(options)
    except ChildFailedError as error:
        if len(Agent.signals) > 1:
            print("ended at once by a second signal; the last checkpoint is good", file=sys.stderr)
            return 128 + Agent.signals[1]
        status, line = status_and_cause(error.failures)
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
