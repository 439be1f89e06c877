"""Hugging Face folders of a run that is still training (EXPORT_EVERY), written by a separate process from its checkpoints."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron.sft.planning.options import TrainOptions
from megatron.sft.planning.run_plan import RunPlan, exported_model
from megatron.sft.runtime import ranks, watchdog

FOLDER = "exports"
_STOP_SECONDS = 10.0


class LiveExport:
    """Exports checkpoints one after the other, on rank 0 only. A failure is logged, and training continues.

    Checkpoints in `needed` must not be removed yet.
    """

    def __init__(self, plan: RunPlan) -> None:
        options: TrainOptions = plan.options
        self._root, self._every = options.save, options.export_every
        self._source = exported_model(plan.start) if self._every else None
        self._waiting: list[int] = []
        self._running: tuple[int, subprocess.Popen[str]] | None = None

    @property
    def needed(self) -> frozenset[int]:
        """Iterations that are being exported or wait for it."""
        return frozenset([*self._waiting, *([self._running[0]] if self._running else [])])

    def saved(self, iteration: int) -> None:
        """A checkpoint of this iteration will be whole soon: export it then, if it is its turn."""
        if self._every and iteration % self._every == 0 and ranks.is_rank_0() and iteration not in self._waiting:
            self._waiting.append(iteration)

    def poll(self, last_saved: int | None) -> None:
        """Report an export that has ended, and start the next whose checkpoint is whole."""
        if self._running:
            iteration, process = self._running
            if process.poll() is None:
                return
            self._running = None
            said = process.communicate()[0].strip().rpartition("\n")[2]
            if process.returncode:
                reason = said.removeprefix("error: ") or f"status {process.returncode}"
                ranks.print_rank_0(
                    f"warning: iteration {iteration} is not exported ({reason}); later: {self._command(iteration)}"
                )
            else:
                ranks.print_rank_0(f"exported iteration {iteration} to {self._output(iteration)}")
        if self._waiting and last_saved is not None and self._waiting[0] <= last_saved:
            self._start(self._waiting.pop(0))

    def finish(self, last_saved: int | None) -> None:
        """Wait for what is left."""
        self.poll(last_saved)
        while self._running:
            watchdog.touch()
            time.sleep(0.2)
            self.poll(last_saved)

    def stop(self) -> None:
        """End what is running, and say what was not exported."""
        for iteration in sorted(self.needed):
            ranks.print_rank_0(f"iteration {iteration} is not exported; later: {self._command(iteration)}")
        self._waiting = []
        if self._running:
            process = self._running[1]
            process.send_signal(signal.SIGINT)  # it removes what it has written
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._running = None

    def _output(self, iteration: int) -> Path:
        return self._root / FOLDER / f"iter_{iteration:07d}"

    def _command(self, iteration: int) -> str:
        return f"bash scripts/5_export.sh {self._root} {self._source} {self._output(iteration)} {iteration}"

    def _start(self, iteration: int) -> None:
        # Without torchrun's variables: an error would be written to this rank's error file.
        hidden = ("TORCHELASTIC_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MEGATRON_SFT_LAUNCHER_PID")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
        # A run that was resumed from before this iteration writes its export again.
        command = ["--load", self._root, "--hf-dir", self._source, "--output", self._output(iteration), "--replace"]
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "megatron.sft.export", *map(str, command), "--iteration", str(iteration)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is meant for the run
            )
            os.setpriority(os.PRIO_PROCESS, process.pid, 10)
        except OSError as error:
            ranks.print_rank_0(
                f"warning: iteration {iteration} is not exported ({error.strerror}); later: {self._command(iteration)}"
            )
            return
        self._running = (iteration, process)
