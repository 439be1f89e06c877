"""The training loop: steps, log lines, validations and saves of one run, until it finishes or is asked to stop."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from megatron.sft.data.mixture import source_names
from megatron.sft.planning.memory import num_parameters
from megatron.sft.planning.options import options_record
from megatron.sft.planning.run_plan import RunPlan
from megatron.sft.reporting import metrics
from megatron.sft.reporting.live_plot import LivePlot
from megatron.sft.reporting.trackers import open_trackers
from megatron.sft.runtime import device, ranks, watchdog
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import write_bytes, write_json
from megatron.sft.runtime.signals import RESUME, StopRequest, name_of
from megatron.sft.training import nonfinite, state
from megatron.sft.training.engine import Engine, StepResult
from megatron.sft.training.feeder import Feeder
from megatron.sft.training.log_window import Window
from megatron.sft.training.pair_guard import AccuracyWatch, Guard
from megatron.sft.training.saver import Saver

# How long a save takes, for the time limit, until one was measured: bytes a parameter (weights, two moments, a 16-bit copy)
# onto a disk of 200 MB/s.
_STATE_BYTES, _DISK_BYTES_A_SECOND = 14, 200e6


def keep_settings(plan: RunPlan) -> None:
    """Copy the recipe and write settings.json, the resolved settings, into the folder of the run; on rank 0 only."""
    folder, recipe = plan.options.save, plan.options.recipe
    if not ranks.is_rank_0():
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if recipe:
            write_bytes(folder / Path(recipe).name, Path(recipe).read_bytes())
        write_json(folder / "settings.json", options_record(plan.options))
    except OSError as error:
        ranks.print_rank_0(f"warning: the settings are not kept in {folder} ({error.strerror}): training continues")


class Run:
    """A run in this process. Every rank goes through the same parts at the same steps."""

    def __init__(self, plan: RunPlan, stop: StopRequest) -> None:
        self.plan, self.options, self.stop = plan, plan.options, stop
        self.engine = Engine(plan)
        self.iteration, self.consumed = 0, 0
        self.saver = Saver(self.engine)
        # A gloo group on GPUs too: agreeing on a stop must not wait for the GPU.
        self._group = torch.distributed.new_group(backend="gloo") if device.has_gpu() else None
        self._world = torch.distributed.get_world_size()
        self._longest_step = 0.0
        self._longest_save = num_parameters(plan.architecture) * _STATE_BYTES / _DISK_BYTES_A_SECOND
        self._spikes = nonfinite.SpikeWatch()
        self._accuracies = AccuracyWatch()
        self._source_names = source_names(plan.rows.manifest) if plan.rows.num_sources else []

    def train(self) -> int:
        """Train to the end; returns the exit status, 0 or RESUME."""
        self._load()
        plan = self.plan
        pending = self._validation_pending()
        if self.iteration >= plan.train_iters and not pending:
            ranks.print_rank_0(f"nothing to do: the run has {plan.train_iters} steps and iteration {self.iteration} is saved")
            return 0
        self.feeder = Feeder(plan, plan.reference.logps if plan.reference else None)
        save = self.options.save
        trackers = open_trackers(save, self.iteration, options_record(self.options))
        num_rows = len(plan.training_rows)
        frozen = plan.trained.lora is not None
        self.log = metrics.MetricsLog(save, plan.train_iters, num_rows, self.iteration, plan.architecture, trackers, frozen)
        self.picture = LivePlot(save)
        self.stop.begin(self.options.exit_after_minutes)
        code = self._stop_requested()
        if pending and not code:
            code = self._validate()
        window = Window(time.monotonic())
        guard = Guard(plan, self.engine.objective)
        while self.iteration < plan.train_iters and not code:
            self._step(window)
            if guard.is_due and (problem := guard.look(window)):
                self._fail(problem)
            code = self._stop_requested()
            if code or self._due(self.options.log_interval, self._eval_interval, self.options.save_interval):
                self._log(window)
                if self._due(self._eval_interval) and not code:
                    code = self._validate()
                if code or self._due(self.options.save_interval):
                    self._save()
                    code = code or self._stop_requested()
                window = Window(time.monotonic())
            self.saver.poll()
        return self._shutdown(code)

    def _load(self) -> None:
        if self.plan.resume:
            self.iteration, self.consumed = state.load(self.engine)
            self.saver.last_saved = self.iteration
            ranks.print_rank_0(f"resumed at iteration {self.iteration}, after {self.consumed:,} rows")
        else:
            state.load_start(self.engine)
        keep_settings(self.plan)
        metrics.forget_after(self.options.save, self.iteration)

    @property
    def _eval_interval(self) -> int:
        return self.options.eval_interval if self.plan.eval_iters else 0

    def _due(self, *intervals: int) -> bool:
        """Whether something that happens every so often and after the last step happens now; an interval of 0 is never."""
        last = self.iteration == self.plan.train_iters
        return any(interval and (last or self.iteration % interval == 0) for interval in intervals)

    def _stop_requested(self) -> int:
        """0, or the code of why some rank wants to end (see StopRequest.code); the same on every rank."""
        return self._all_reduce_max(self.stop.code(self._longest_step + 1.2 * self._longest_save))

    def _all_reduce_max(self, number: int) -> int:
        """The largest of all ranks' numbers; every rank must call it."""
        if self._world > 1:
            numbers = torch.tensor(number, dtype=torch.int64)
            torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=self._group)
            number = int(numbers)
        return number

    def _validation_pending(self) -> bool:
        """Whether the validation after this iteration was interrupted, so that the checkpoint was saved without it."""
        due = self.iteration > 0 and self._due(self._eval_interval) and ranks.is_rank_0()
        return bool(self._all_reduce_max(due and not metrics.has_validation(self.options.save, self.iteration)))

    def _step(self, window: Window) -> None:
        started = time.monotonic()
        watchdog.enter("data", self.iteration + 1)
        batches = self.feeder.training(self.consumed)
        watchdog.enter("forward and backward")
        result = self.engine.train_step(batches)
        if result.applied:
            window.add(batches, result)
        else:
            self._skip(result)
        self.iteration += 1
        self.consumed += self.options.global_batch_size
        self._longest_step = max(self._longest_step, time.monotonic() - started)

    def _skip(self, result: StepResult) -> None:
        """Account for a step that left the weights as they were."""
        counters, number = self.engine.counters, self.iteration + 1
        if result.overflow:
            counters["overflows"] += 1
            return
        watchdog.enter("search for numbers that are not finite")
        what = f"iteration {number}: the gradient is not finite (norm {result.grad_norm})"
        what += f": {nonfinite.blame(self.engine, self.feeder, self.consumed)}"
        counters["skipped_steps"] += 1
        skipped, limit = counters["skipped_steps"], self.options.max_skipped
        if self.options.on_nan == "stop":
            self._fail(f"{what}; lower LR, fix the data, or skip such steps with ON_NAN=skip")
        if skipped > limit:
            self._fail(f"{what}; {skipped} steps skipped, the limit is MAX_SKIPPED={limit}: lower LR or fix the data")
        ranks.print_rank_0(f"warning: skipped {what} ({skipped} of at most {limit})")

    def _fail(self, reason: str) -> NoReturn:
        """End the run for a reason that every rank has found; a checkpoint that is being written is finished first."""
        watchdog.enter("save")
        self.saver.finish()
        raise UserError(reason)

    def _log(self, window: Window) -> None:
        watchdog.enter("log")
        if window.last is None:
            return
        result, steps = window.last, window.steps
        totals = window.totals(self.plan.layout.model_size, self._source_names)
        seconds = (time.monotonic() - window.started) / steps
        if not math.isfinite(totals.loss):
            self._fail(
                f"the loss became {totals.loss} at iteration {self.iteration}: lower LR, or look at the data with "
                "tools/show_sample"
            )
        self.log.step(
            metrics.StepMetrics(
                iteration=self.iteration,
                consumed_rows=self.consumed,
                loss=totals.loss,
                lr=result.lr,
                grad_norm=result.grad_norm,
                seconds=seconds,
                tokens=totals.tokens // steps,
                trained_tokens=totals.trained_tokens // steps,
                sum_squared_lengths=totals.sum_squared_lengths // steps,
                num_processes=self._world,
                skipped_steps=self.engine.counters["skipped_steps"],
                source_losses=totals.source_losses,
                loss_scale=self._loss_scale(),
                memory_bytes=totals.memory_bytes,
                pairs=totals.pairs,
            )
        )
        if totals.pairs and (warning := self._accuracies.look(totals.pairs["rewards/accuracies"])):
            ranks.print_rank_0(f"warning: iteration {self.iteration}: {warning}")
        if warning := self._spikes.look(totals.loss):
            ranks.print_rank_0(f"warning: iteration {self.iteration}: {warning}")

    def _loss_scale(self) -> float | None:
        return float(self.engine.optimizer.get_loss_scale()) if self.options.precision == "fp16" else None

    def _validate(self) -> int:
        """Mean loss over the validation rows (or EVAL_ITERS global batches of them), the same rows every time.

        Returns 0, or the code of why it was interrupted.
        """
        sums = None
        for index in range(self.plan.eval_iters):
            watchdog.enter("validation")
            part = self.engine.evaluate(self.feeder.validation(index))
            sums = part.values if sums is None else sums + part.values
            if code := self._stop_requested():
                return code
        assert sums is not None
        means = replace(part, values=sums).reduced()
        if not math.isfinite(means.loss):
            ranks.print_rank_0(f"warning: the validation loss is {means.loss}: look at the validation rows, or at the weights")
        self.log.validation(self.iteration, means.loss, means.trained_tokens, means.pairs)
        return 0

    def _save(self) -> None:
        watchdog.enter("save")
        started = time.monotonic()
        self.saver.save(self.iteration, self.consumed)
        self._longest_save = max(self._longest_save, time.monotonic() - started)
        self.picture.redraw()

    def _shutdown(self, code: int) -> int:
        watchdog.enter("save")
        self.saver.finish()
        finished = self.iteration == self.plan.train_iters and not self._validation_pending()
        self.stop.leave()
        watchdog.enter("exit")
        self.log.close()
        self.picture.close()
        save = self.options.save
        if finished:
            ranks.print_rank_0(f"done: {self.iteration} steps, checkpoints in {save}\nnext: scripts/5_export.sh {save}")
            return 0
        kept = f"after iteration {self.iteration}, which is saved" if self.saver.last_saved else "before the first step"
        ranks.print_rank_0(f"stopped by {name_of(code)} {kept}: the same command continues from there (status {RESUME})")
        return RESUME
