"""The run as it can be watched: a log line a step, and metrics.jsonl, the record that every plot is made from."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.sft import processes

FILE = "metrics.jsonl"


@dataclass
class MetricsLog:
    """Writes lines of one run. Only the first process prints and writes."""

    folder: Path
    train_iters: int
    rows_an_epoch: int
    start_iteration: int
    _started: float = field(default_factory=time.monotonic)

    def step(
        self,
        iteration: int,
        consumed_rows: int,
        loss: float,
        lr: float,
        grad_norm: float,
        seconds: float,
        tokens: int,
        trained_tokens: int,
        num_processes: int,
    ) -> None:
        """One training step, or the mean of several: `seconds` and the token counts are of one step."""
        rate = tokens / seconds
        epoch = consumed_rows / self.rows_an_epoch
        done = iteration - self.start_iteration
        eta = (time.monotonic() - self._started) / max(done, 1) * (self.train_iters - iteration)
        each = f" ({_short(rate / num_processes)} each)" if num_processes > 1 else ""
        processes.say(
            f"iteration {iteration:>{len(str(self.train_iters))}}/{self.train_iters} | epoch {epoch:.2f} | "
            f"loss {loss:.4f} | lr {lr:.2e} | grad norm {grad_norm:.2f} | {seconds:.2f} s | "
            f"{_short(rate)} tokens/s{each} | trained {100 * trained_tokens / max(tokens, 1):.0f} % | ETA {clock(eta)}"
        )
        self._write(
            iteration=iteration,
            epoch=round(epoch, 6),
            consumed_rows=consumed_rows,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            seconds=round(seconds, 6),
            tokens_per_second=round(rate, 2),
            tokens=tokens,
            trained_tokens=trained_tokens,
        )

    def validation(self, iteration: int, loss: float, trained_tokens: int) -> None:
        """The mean loss on the validation rows after `iteration` steps."""
        processes.say(f"validation after iteration {iteration} | loss {loss:.4f} | {trained_tokens:,} trained tokens")
        self._write(iteration=iteration, validation_loss=loss, trained_tokens=trained_tokens)

    def _write(self, **values: Any) -> None:
        if processes.is_first():
            with open(self.folder / FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")


def forget_after(folder: Path, iteration: int) -> None:
    """Drop lines of steps after `iteration`, which a resumed run will do again, from metrics.jsonl."""
    path = folder / FILE
    if not processes.is_first() or not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] <= iteration]
    from megatron.sft.manifest import write_text

    write_text(path, "".join(kept))


def clock(seconds: float) -> str:
    """`58m12s`, `3h05m`, `2d04h`."""
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{whole % 60:02d}s"


def _short(rate: float) -> str:
    return f"{rate / 1000:.1f}k" if rate >= 1000 else f"{rate:.0f}"
