"""A run's log lines, and metrics.jsonl, from which every plot is made: one line for each logged step."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.flops import training_flops
from megatron.sft.reporting.curves import METRICS
from megatron.sft.reporting.trackers import Tracker
from megatron.sft.runtime import device, ranks
from megatron.sft.runtime.manifest import write_text


@dataclass(frozen=True)
class StepMetrics:
    """One training step, or the mean of the steps since the last line: `seconds` and all counts of tokens are of one step.

    loss: per trained token, or per pair. tokens: without padding. trained_tokens: those with a loss. sum_squared_lengths: over
    the step's conversations, for the operations of attention. num_processes: those that share the work, one a GPU.
    skipped_steps: in the whole run so far. source_losses: name of a data source to its mean loss per trained token and its
    trained tokens, of all steps since the last line. loss_scale: of fp16. memory_bytes: the largest peak of a process. pairs:
    means over the pairs, by TRL's names, with the two parts of the loss where it has an SFT part. experts: of mixtures, the
    tokens of the most loaded expert over the mean, on average over the layers (`expert_load`) and in the worst one
    (`expert_load_worst`, `expert_load_layer`), and with MOE_AUX_LOSS the loss before its coefficient (`moe_aux_loss`).
    """

    iteration: int
    consumed_rows: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float
    tokens: int
    trained_tokens: int
    sum_squared_lengths: int
    num_processes: int
    skipped_steps: int = 0
    source_losses: dict[str, tuple[float, int]] = field(default_factory=dict)
    loss_scale: float | None = None
    memory_bytes: int = 0
    pairs: dict[str, float] = field(default_factory=dict)
    experts: dict[str, float] = field(default_factory=dict)


@dataclass
class MetricsLog:
    """Writes the metrics of one run: to the log, metrics.jsonl and the trackers. Only rank 0 prints and writes.

    start_iteration: after which this process began, for the ETA. architecture: of the model, for TFLOP/s.
    frozen: its weights are, under adapters.
    """

    folder: Path
    train_iters: int
    rows_an_epoch: int
    start_iteration: int
    architecture: Architecture
    trackers: Sequence[Tracker] = ()
    frozen: bool = False
    _started: float = field(default_factory=time.monotonic)
    _unwritten: str = ""
    _warned: bool = False

    def step(self, step: StepMetrics) -> None:
        """Write one step: a line in the log and in metrics.jsonl, and to every tracker."""
        tflops = self._tflops(step)
        peak = device.peak_tflops()
        mfu = tflops / peak if peak else None
        ranks.rewrite_rank_0(self._line(step, tflops, mfu))
        sources = {name: values for name, values in step.source_losses.items() if values[1]}
        values = {
            **vars(step),
            "epoch": round(self._epoch(step), 6),
            "grad_norm": step.grad_norm if math.isfinite(step.grad_norm) else None,
            "seconds": round(step.seconds, 6),
            "tokens_per_second": round(step.tokens / step.seconds, 2),
            "tflops_per_process": round(tflops, 4),
            "mfu": None if mfu is None else round(mfu, 4),
            **step.pairs,
            **step.experts,
            "sources": {name: {"loss": loss, "trained_tokens": tokens} for name, (loss, tokens) in sources.items()},
        }
        hidden = ("sum_squared_lengths", "num_processes", "source_losses", "pairs", "experts")
        self._write({name: value for name, value in values.items() if name not in hidden and value not in (None, {})})

    def validation(self, iteration: int, loss: float, trained_tokens: int, pairs: dict[str, float] | None = None) -> None:
        """Write the mean loss on the validation rows after `iteration` steps, and the means over their pairs."""
        parts = [f"validation after iteration {iteration}", f"loss {loss:.4f}", *_pair_parts(pairs or {})]
        ranks.print_rank_0(ranks.colored(" | ".join([*parts, f"{trained_tokens:,} trained tokens"])))
        self._write({"iteration": iteration, "validation_loss": loss, "trained_tokens": trained_tokens, **(pairs or {})})

    def close(self) -> None:
        """Flush and close the trackers."""
        for tracker in self.trackers:
            tracker.close()

    def _epoch(self, step: StepMetrics) -> float:
        return step.consumed_rows / self.rows_an_epoch

    def _tflops(self, step: StepMetrics) -> float:
        """TFLOP/s of one process, as a mean over the step."""
        operations = training_flops(self.architecture, step.tokens, step.trained_tokens, step.sum_squared_lengths, self.frozen)
        return operations / step.seconds / step.num_processes / 1e12

    def _line(self, step: StepMetrics, tflops: float, mfu: float | None) -> str:
        rate = step.tokens / step.seconds
        done = step.iteration - self.start_iteration
        eta = (time.monotonic() - self._started) / max(done, 1) * (self.train_iters - step.iteration)
        # Of a CPU neither says anything.
        efficiency = [f"{tflops:.3g} TFLOP/s per GPU" + (f", MFU {100 * mfu:.1f} %" if mfu is not None else "")]
        memory = [f"memory {step.memory_bytes / 2**30:.1f} GiB"]
        parts = [
            f"iteration {step.iteration:>{len(str(self.train_iters))}}/{self.train_iters}",
            f"epoch {self._epoch(step):.2f}",
            f"loss {step.loss:.4f}",
            *_pair_parts(step.pairs),
            *_expert_parts(step.experts),
            f"lr {step.lr:.2e}",
            f"grad norm {step.grad_norm:.2f}",
            f"{step.seconds:.2f} s",
            f"{_short(rate)} tokens/s",
            *(efficiency + memory if device.has_gpu() or mfu is not None else []),
            *([f"skipped {step.skipped_steps}"] if step.skipped_steps else []),
            *([f"loss scale {step.loss_scale:g}"] if step.loss_scale is not None else []),
            f"ETA {clock(eta)}",
        ]
        return " | ".join(parts)

    def _write(self, values: dict[str, Any]) -> None:
        if ranks.is_rank_0():
            # JSON has no number that is not finite.
            line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            self._append(json.dumps(line) + "\n")
            for tracker in self.trackers:
                tracker.write(values)

    def _append(self, line: str) -> None:
        """Lines that cannot be written now, on a full disk or after the file was taken away, are written with a later one."""
        self._unwritten += line
        try:
            with open(self.folder / METRICS, "a", encoding="utf-8") as file:
                file.write(self._unwritten)
        except OSError as error:
            if not self._warned:
                ranks.print_rank_0(f"warning: {self.folder / METRICS} cannot be written ({error.strerror}): training continues")
            self._warned = True
        else:
            self._unwritten, self._warned = "", False


def _pair_parts(pairs: dict[str, float]) -> list[str]:
    """What a log line says of pairs."""
    if not pairs:
        return []
    accuracy, margin = pairs["rewards/accuracies"], pairs["rewards/margins"]
    rewards = f"rewards {pairs['rewards/chosen']:+.4f} {pairs['rewards/rejected']:+.4f}, margin {margin:.4f}"
    logps = f"log p {pairs['logps/chosen']:.1f} {pairs['logps/rejected']:.1f}"
    sft = [f"SFT part {pairs['sft_loss']:.4f}"] if "sft_loss" in pairs else []
    return [*sft, f"{rewards}, accuracy {100 * accuracy:.0f} %", logps]


def _expert_parts(experts: dict[str, float]) -> list[str]:
    """What a log line says of a mixture's load."""
    if not experts:
        return []
    worst = f"in layer {experts['expert_load_layer']:.0f} {experts['expert_load_worst']:.2f}"
    loss = [f"balance {experts['moe_aux_loss']:.3f}"] if "moe_aux_loss" in experts else []
    return [f"most loaded expert {experts['expert_load']:.2f} x the mean, {worst}", *loss]


def forget_after(folder: Path, iteration: int) -> None:
    """Drop from metrics.jsonl the steps after `iteration`, which a resumed run repeats, and a truncated last line."""
    path = folder / METRICS
    if not ranks.is_rank_0() or not path.exists():
        return
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if _is_kept(line, iteration)))
    except OSError as error:
        ranks.print_rank_0(f"warning: {path} cannot be brought back to iteration {iteration} ({error.strerror}): fix it later")


def logged_validation(folder: Path, iteration: int) -> float | None:
    """The validation loss after `iteration` steps in metrics.jsonl, NaN if it was not finite, None if there is none."""
    path = folder / METRICS
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError:
        return None
    found = [line for line in lines if "validation_loss" in line and _iteration(line) == iteration]
    loss = json.loads(found[-1])["validation_loss"] if found else None
    return math.nan if found and loss is None else loss


def _is_kept(line: str, iteration: int) -> bool:
    """False for a step after `iteration`, and if the line is truncated or damaged (killed process, full disk)."""
    found = _iteration(line)
    return found is not None and found <= iteration


def _iteration(line: str) -> int | None:
    try:
        return int(json.loads(line)["iteration"]) if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def clock(seconds: float) -> str:
    """`58m12s`, `3h05m`, `2d04h`."""
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{whole % 60:02d}s"


def _short(rate: float) -> str:
    return f"{rate / 1000:.1f}k" if rate >= 1000 else f"{rate:.0f}"
