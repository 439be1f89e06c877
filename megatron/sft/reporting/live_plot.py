"""loss.png of a run that is still training, drawn by a separate process, so that training neither waits nor stops for it."""

import os
import subprocess
import sys
from pathlib import Path

from megatron.sft.reporting.curves import METRICS
from megatron.sft.runtime import ranks

PICTURE = "loss.png"
LAST_SECONDS = 60.0  # for which the end of a run waits for its last picture


class LivePlot:
    """Draws the picture of a run's folder, on rank 0 only. A failure is logged once, and nothing is drawn after it."""

    def __init__(self, folder: Path) -> None:
        self._command = [sys.executable, "-m", "megatron.sft.plot", str(folder), "--output", str(folder / PICTURE)]
        self._metrics = folder / METRICS
        self._drawn_bytes = -1  # of the metrics when the last drawing started
        self._drawing: subprocess.Popen[str] | None = None
        self._has_failed = not ranks.is_rank_0()

    def redraw(self) -> None:
        """Start drawing, unless the last picture is still being drawn."""
        if self._has_failed or not self._is_finished(0.0):
            return
        # Without torchrun's variables: an error would be written to this rank's error file.
        hidden = ("TORCHELASTIC_", "RANK", "LOCAL_RANK", "WORLD_SIZE")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        self._drawn_bytes = self._num_bytes()
        try:
            self._drawing = subprocess.Popen(
                self._command,
                env=environment | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is meant for the run
            )
            os.setpriority(os.PRIO_PROCESS, self._drawing.pid, 10)
        except OSError as error:
            self._give_up(str(error))

    def close(self) -> None:
        """Draw what is not drawn yet and wait for it, LAST_SECONDS for each step at most."""
        if not self._has_failed and self._is_finished(LAST_SECONDS) and self._drawn_bytes != self._num_bytes():
            self.redraw()
            self._is_finished(LAST_SECONDS)
        if self._drawing is not None:
            self._drawing.kill()
            self._drawing.wait()

    def _num_bytes(self) -> int:
        try:
            return self._metrics.stat().st_size
        except OSError:
            return 0

    def _is_finished(self, seconds: float) -> bool:
        if self._drawing is None:
            return True
        try:
            status = self._drawing.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        reason = self._drawing.stderr.read().strip() if self._drawing.stderr else ""
        self._drawing = None
        if status:
            self._give_up(reason.rpartition("\n")[2] or f"status {status}")
        return not status

    def _give_up(self, reason: str) -> None:
        self._has_failed = True
        ranks.print_rank_0(f"warning: {PICTURE} is not drawn ({reason}); later: tools/plot_loss RUN")
