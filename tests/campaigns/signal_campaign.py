"""Every fault at every moment of a run: signals, killed and stopped processes, a full and a broken disk, dead threads, numbers
that are not finite. Each must end within a minute with its reason, lose no finished step where a signal can be caught, and
leave a folder from which the same command finishes as if nothing had happened.

python -m tests.campaigns.signal_campaign [--layout DP2] [--faults SIGTERM,…] [--moments start,…] [--folder DIR]
"""

import argparse
import errno
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.sft.data.row_order import RowOrder, split_rows
from tests.support import tiny
from tests.support.real_runs import HANG_SECONDS, ROWS, STEPS, Material, RealRun, Seen, assert_same_run, losses, make_material

# Where the last process is held for a moment while the fault strikes: part and iteration.
MOMENTS = {
    "start": ("start-up", 0),
    "step": ("forward and backward", 5),
    "validation": ("validation", 8),
    "save": ("save", 6),
    "exit": ("exit", STEPS),
}
HELD_SECONDS = 1.5
POISON: dict[str, object] = {"poison": tiny.VOCAB_SIZE - 1}
RESUME, HUNG = 75, 124


@dataclass(frozen=True)
class Outcome:
    """status: of the struck run. seconds: from the strike to its end, None where nothing is done to the run from outside. kept,
    finished: steps saved and steps logged by then."""

    status: int
    seconds: float | None
    kept: int
    finished: int
    line: str

    def __str__(self) -> str:
        time_taken = "" if self.seconds is None else f" in {self.seconds:.0f} s"
        return f"status {self.status}{time_taken}, {self.kept} of {self.finished} steps kept"


@dataclass(frozen=True)
class Case:
    run: RealRun
    moment: str
    part: str
    iteration: int

    @property
    def held(self) -> dict[str, object]:
        return {"hold": [self.part, self.iteration, self.last_rank, HELD_SECONDS]}

    @property
    def last_rank(self) -> int:
        return 0 if self.run.layout == "1x1" else 1

    def strike(self, act: Callable[[Seen], None], faults: dict[str, object] | None = None, **environment: str) -> Outcome:
        """Start, act when the last process is in the part, and wait for the end."""
        self.run.start({**self.held, **(faults or {})}, environment)
        seen = self.run.wait_for(self.part, self.iteration, self.last_rank)
        assert seen is not None, self.run.output
        struck = time.monotonic()
        act(seen)
        status = self.run.finish(HANG_SECONDS)
        seconds = time.monotonic() - struck
        finished = max([line[0] for line in losses(self.run.save) if line[1] is not None], default=0) if self._has_log else 0
        return Outcome(status, seconds, self.run.latest(), finished, _error_line(self.run.output))

    @property
    def _has_log(self) -> bool:
        return (self.run.save / "metrics.jsonl").exists()


def _error_line(output: str) -> str:
    return next((line for line in reversed(output.splitlines()) if line.startswith("error: ")), "")


def catchable(number: signal.Signals, to_launcher: bool) -> Callable[[Case], Outcome]:
    def fault(case: Case) -> Outcome:
        def act(seen: Seen) -> None:
            assert case.run.process is not None
            os.kill(case.run.process.pid if to_launcher else seen.pid, number)

        outcome = case.strike(act)
        assert outcome.status == (0 if case.moment == "exit" else RESUME), case.run.output
        assert outcome.kept == outcome.finished, case.run.output
        return outcome

    return fault


def killed_rank(case: Case) -> Outcome:
    pids: list[int] = []

    def act(seen: Seen) -> None:
        pids.append(seen.pid)
        os.kill(seen.pid, signal.SIGKILL)

    outcome = case.strike(act)
    assert outcome.status == 128 + signal.SIGKILL, case.run.output
    assert f"rank {case.last_rank} (process {pids[0]}) was ended by SIGKILL" in outcome.line, case.run.output
    return outcome


def stopped_rank(case: Case) -> Outcome:
    outcome = case.strike(lambda seen: os.kill(seen.pid, signal.SIGSTOP))
    assert outcome.status == HUNG, case.run.output
    assert re.search(rf"rank {case.last_rank} .*(was stopped|has been silent)", outcome.line), case.run.output
    return outcome


def stalled_thread(case: Case) -> Outcome:
    """The main thread of one rank waits for ever; the watchdog is set to 12 s, 36 s in a start, a save and the first step."""
    endless: dict[str, object] = {"hold": [case.part, case.iteration, case.last_rank, 600]}
    outcome = case.strike(lambda _: None, endless)
    assert outcome.status == HUNG, case.run.output
    assert f"rank {case.last_rank} hung" in outcome.line and case.part in outcome.line, case.run.output
    return outcome


def failing_disk(number: int) -> Callable[[Case], Outcome]:
    def fault(case: Case) -> Outcome:
        when = case.run.save.with_suffix(".broken")
        library = _failing_disk_library(case.run.material.folder)
        broken: dict[str, object] = {"break": [case.part, case.iteration, case.last_rank, str(when)]}
        preload = {"LD_PRELOAD": str(library), "FAILING_DISK": f"{case.run.save}/", "FAILING_DISK_WHEN": str(when)}
        outcome = case.strike(lambda _: None, broken, **preload, FAILING_DISK_ERRNO=str(number))
        # After the last save nothing is written any more.
        assert outcome.status == (0 if case.moment == "exit" else 2), case.run.output
        assert case.moment == "exit" or os.strerror(number) in outcome.line, case.run.output
        return outcome

    return fault


def _failing_disk_library(folder: Path) -> Path:
    library = folder / "failing_disk.so"
    if not library.exists():
        source = tiny.ROOT / "tests" / "support" / "failing_disk.c"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def dead_thread(what: str, harmless: tuple[str, ...]) -> Callable[[Case], Outcome]:
    """harmless: the moments after which the thread has nothing left to do."""

    def fault(case: Case) -> Outcome:
        broken: dict[str, object] = {"break": [case.part, case.iteration, case.last_rank, what]}
        outcome = case.strike(lambda _: None, broken)
        assert (outcome.status == 0) == (case.moment in harmless), case.run.output
        assert case.moment in harmless or "injected" in case.run.output, case.run.output
        return outcome

    return fault


def not_finite(case: Case) -> Outcome:
    """A conversation gives NaN: the step of the moment, or the validation, meets it."""
    step = {"start": 1, "step": 5, "save": 6, "exit": STEPS - 1}.get(case.moment)
    poisoned = poison(case.run.material, case.moment, step)
    run = RealRun(poisoned, case.run.save, case.run.layout)
    case = Case(run, case.moment, case.part, case.iteration)
    outcome = _plain(case)
    if step is None:
        assert outcome.status == 0 and "validation" in run.output, run.output
        return outcome
    assert outcome.status == 2 and re.search(rf"iteration {step}: .* row \d+, conversation 1 of \d+ of ", outcome.line)
    return outcome


def _plain(case: Case) -> Outcome:
    status = case.run.start(POISON).finish()
    return Outcome(status, None, case.run.latest(), case.run.latest(), _error_line(case.run.output))


def poison(material: Material, name: str, step: int | None) -> Material:
    """The same with a conversation whose loss is NaN, in a row of `step`, or in one of the validation rows if None.

    It has the last token, which faulty_train gives a NaN embedding if FAULTS says so with POISON.
    """
    folder = material.folder / f"poisoned-{name}"
    if not folder.exists():
        folder.mkdir()
        last = tiny.VOCAB_SIZE - 1
        rows = [[(np.minimum(p, last - 1), np.minimum(a, last - 1)) for p, a in row] for row in ROWS]
        training, validation = split_rows(len(rows), 0.9, 0.1, seed=1234)
        number = validation[0] if step is None else RowOrder(training, seed=1234).row_at(4 * (step - 1))
        rows[int(number)][0][0][0] = last
        tiny.write_rows(folder / "rows", rows, length=64)
    return Material(material.checkpoint, folder / "rows", folder)


FAULTS: dict[str, Callable[[Case], Outcome]] = {
    "SIGTERM": catchable(signal.SIGTERM, to_launcher=True),
    "SIGTERM to one rank": catchable(signal.SIGTERM, to_launcher=False),
    "SIGINT": catchable(signal.SIGINT, to_launcher=True),
    "SIGUSR1": catchable(signal.SIGUSR1, to_launcher=True),
    "SIGUSR1 to one rank": catchable(signal.SIGUSR1, to_launcher=False),
    "SIGKILL of one rank": killed_rank,
    "SIGSTOP of one rank": stopped_rank,
    "a thread that hangs": stalled_thread,
    "ENOSPC": failing_disk(errno.ENOSPC),
    "EIO on write": failing_disk(errno.EIO),
    "dead data worker": dead_thread("data worker", harmless=("exit",)),
    "dead checkpoint writer": dead_thread("checkpoint writer", harmless=("exit",)),
    "NaN": not_finite,
}


def try_out(material: Material, fault: str, moment: str, layout: str) -> Outcome:
    """One fault at one moment, and the same command again afterwards."""
    run = RealRun(material, material.folder / f"{layout} {fault} {moment}", layout, ["--watchdog-minutes", "0.2"])
    case = Case(run, moment, *MOMENTS[moment])
    outcome = FAULTS[fault](case)
    assert outcome.seconds is None or outcome.seconds < HANG_SECONDS
    run.save.with_suffix(".broken").unlink(missing_ok=True)
    if fault == "NaN":
        again = RealRun(poison(material, moment, None), run.save, layout, ["--on-nan", "skip"])
        assert again.start(POISON).finish() == 0, again.output
    else:
        assert run.start().finish() == 0, run.output
        assert_same_run(run, material.reference(layout))
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--layout", default="DP2")
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--moments", default=",".join(MOMENTS))
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    moments = given.moments.split(",")
    with tempfile.TemporaryDirectory(prefix="signals-") as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        material = make_material(folder)
        rows = []
        for fault in given.faults.split(","):
            outcomes = []
            for moment in moments:
                try:
                    outcome = try_out(material, fault, moment, given.layout)
                    outcomes.append(str(outcome))
                    print(f"{fault} x {moment}: {outcome} {outcome.line}", flush=True)
                except AssertionError as error:
                    outcomes.append("FAILED")
                    print(f"{fault} x {moment}: FAILED {error}", flush=True)
            rows.append(f"| {fault} | " + " | ".join(outcomes) + " |")
        failed = sum(row.count("FAILED") for row in rows)
        print(f"| fault | {' | '.join(moments)} |\n|{'---|' * (len(moments) + 1)}", *rows, sep="\n")
        if failed:
            raise SystemExit(f"{failed} cases failed")


if __name__ == "__main__":
    main()
