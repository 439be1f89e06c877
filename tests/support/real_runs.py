"""Training runs of real processes for the tests and campaigns of faults: started, watched part by part, struck, compared."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import tiny

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1x1": (1, []),
    "DP2": (2, []),
    "TP2": (2, ["--tensor-model-parallel-size", "2"]),
    "PP2": (2, ["--pipeline-model-parallel-size", "2"]),
    # Dropout takes the random generators' state.
    "TP2 with adapters": (2, ["--tensor-model-parallel-size", "2", "--lora-rank", "4", "--lora-dropout", "0.2"]),
}
# 12 quick steps, with a validation after every 4 and a checkpoint after every 2.
STEPS = 12
OPTIONS = ["--precision", "fp32", "--lr", "1e-3", "--min-lr", "1e-4", "--train-iters", str(STEPS), "--split", "90,10,0"]
OPTIONS += ["--global-batch-size", "4", "--micro-batch-size", "2", "--eval-interval", "4", "--save-interval", "2"]
ROWS = tiny.random_rows(48, 64)
HANG_SECONDS = 60.0
# A run that is not struck is given longer: other work may keep the machine busy.
PATIENCE_SECONDS = 240.0


@dataclass(frozen=True)
class Seen:
    """A line of the announcements of `faulty_train`."""

    rank: int
    pid: int
    part: str
    iteration: int


@dataclass
class Material:
    """What runs start from, and what a run that nothing happened to came to in each layout."""

    checkpoint: Path
    data: Path
    folder: Path
    references: dict[str, Path] = field(default_factory=dict)

    def reference(self, layout: str, options: Sequence[str] = ()) -> Path:
        key = " ".join([layout, *options])
        if key not in self.references:
            run = RealRun(self, self.folder / f"reference {len(self.references)}", layout, options)
            assert run.start().finish() == 0, run.output
            self.references[key] = run.save
        return self.references[key]


def make_material(folder: Path) -> Material:
    model = tiny.save_qwen2(folder / "tiny_qwen2", tied=False)
    tiny.run_module("convert", "--hf-dir", model, "--output", folder / "converted")
    data = tiny.write_rows(folder / "rows", ROWS, length=64)
    return Material(folder / "converted", data, folder)


class RealRun:
    """One OUTPUT_PATH, which the same command is started on again and again."""

    def __init__(self, material: Material, save: Path, layout: str, options: Sequence[str] = ()) -> None:
        self.material, self.save, self.layout = material, save, layout
        processes, parallel = LAYOUTS[layout]
        arguments = ["--load", material.checkpoint, "--data-path", material.data, "--save", save, *OPTIONS, *parallel]
        torchrun = ["--standalone", "--local-addr", "localhost", "--nproc-per-node", str(processes)]
        self.launcher = [sys.executable, "-m", "megatron.sft.launch", *torchrun]
        self.arguments = [str(tiny.ROOT / "tests" / "support" / "faulty_train.py"), *map(str, arguments), *options]
        self.announcements = save.with_name(save.name + ".parts")
        self.log = save.with_name(save.name + ".log")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, faults: dict[str, object] | None = None, environment: dict[str, str] | None = None) -> "RealRun":
        self.announcements.write_text("")
        given = {"announce": str(self.announcements), **(faults or {})}
        basic = {"PYTHONPATH": str(tiny.ROOT), "OMP_NUM_THREADS": "1", "MEGATRON_SFT_DEVICE": "cpu"}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*self.launcher, *self.arguments],
                env={**os.environ, **basic, "FAULTS": json.dumps(given), **(environment or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started = time.monotonic()
        return self

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def seen(self) -> list[Seen]:
        lines = [line.split() for line in self.announcements.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [Seen(int(rank), int(pid), part.replace("-and-", " and "), int(n)) for rank, pid, part, n in lines]

    def wait_for(self, part: str, iteration: int = 0, rank: int = 0) -> Seen | None:
        """Wait until a process of `rank` enters the part; None if the run ends before."""
        assert self.process is not None
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            ended = self.process.poll() is not None
            for each in self.seen():
                if each.part == part.replace(" and ", " and ") and each.rank == rank and iteration in (0, each.iteration):
                    return each
            if ended:
                return None
            time.sleep(0.02)
        self.kill()
        raise AssertionError(f"{part} of iteration {iteration} was not reached in {PATIENCE_SECONDS:.0f} s:\n{self.output}")

    def finish(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Wait for the end, at most so long; returns the exit status."""
        assert self.process is not None
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"did not end in {seconds:.0f} s:\n{self.output[-3000:]}") from None

    def kill(self) -> None:
        """SIGKILL every process of the run, the launcher first."""
        assert self.process is not None
        for pid in [self.process.pid, *{each.pid for each in self.seen()}]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def latest(self) -> int:
        """The iteration of the newest checkpoint, 0 without one."""
        tracker = self.save / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text()) if tracker.exists() else 0


def pids_below(pid: int) -> list[int]:
    """The children of a process, theirs, and so on."""
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [each for child in children for each in (child, *pids_below(child))]


def losses(save: Path) -> list[tuple[int, object, object, object]]:
    """Every loss, validation loss and gradient norm of a run, in the order of metrics.jsonl."""
    names = ("iteration", "loss", "validation_loss", "grad_norm")
    return [tuple(line.get(name) for name in names) for line in tiny.metrics(save)]  # type: ignore[misc]


def assert_same_run(run: RealRun, reference: Path) -> None:
    """Bit-identical: every loss, and the bytes of the last checkpoint's weights, moments and generators."""
    assert losses(run.save) == losses(reference)
    ours, theirs = (_tensor_files(folder / f"iter_{STEPS:07d}") for folder in (run.save, reference))
    assert ours == theirs and ours


def _tensor_files(checkpoint: Path) -> dict[str, str]:
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: record["sha256"] for name, record in files.items() if name.endswith(".distcp")}
