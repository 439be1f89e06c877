"""The training loop: steps, log lines, validations and saves of one run, until it finishes or is asked to stop."""

import math
import time
from dataclasses import replace
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
from megatron.sft.runtime.signals import RESUME, STOP_FILE, StopRequest, name_of
from megatron.sft.training import nonfinite, state
from megatron.sft.training.engine import Engine, StepResult
from megatron.sft.training.feeder import Feeder
from megatron.sft.training.log_window import Window, expert_values
from megatron.sft.training.pair_guard import AccuracyWatch, wrong_start
from megatron.sft.training.saver import Saver
from megatron.sft.training.steering.endings import keep_settings, name_best, nothing_left, say_last_words
from megatron.sft.training.steering.live_export import LiveExport
from megatron.sft.training.steering.requests import Requests

# How long a save takes, for the time limit, until one was measured: bytes a parameter (weights, two moments, a 16-bit copy)
# onto a disk of 200 MB/s.
_STATE_BYTES, _DISK_BYTES_A_SECOND = 14, 200e6
# An untrained model's share of the loss of guessing from which on something is likely to be wrong with the data.
GUESSING = 0.9


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
        self.requests = Requests(self.options.save)
        self.exports = LiveExport(plan)
        self._save_wanted = False
        self._accuracies = AccuracyWatch()
        self._source_names = source_names(plan.rows.manifest) if plan.rows.num_sources else []

    def train(self) -> int:
        """Train to the end; returns the exit status, 0 or RESUME."""
        self._load()
        plan = self.plan
        pending = self._validation_pending()
        if not pending and (reason := nothing_left(plan, self.saver.watch, self.iteration)):
            ranks.print_rank_0(reason)
            return 0
        self.feeder = Feeder(plan, plan.reference.logps if plan.reference else None)
        save = self.options.save
        trackers = open_trackers(save, self.iteration, options_record(self.options))
        num_rows = len(plan.training_rows)
        frozen = plan.trained.lora is not None
        self.log = metrics.MetricsLog(save, plan.train_iters, num_rows, self.iteration, plan.architecture, trackers, frozen)
        self.picture = LivePlot(save)
        self.stop.begin(self.options.exit_after_minutes)
        watchdog.enter("comparison with the reference")
        if not self.iteration and (problem := wrong_start(self.engine, self.feeder)):
            self._fail(problem)
        code = self._stop_requested()
        if pending and not code:
            code = self._validate()
        window = Window(time.monotonic())
        saves = self.options.save_interval, self.options.export_every
        while self.iteration < plan.train_iters and not code and not self._gave_up:
            self._step(window)
            code = self._stop_requested()
            if code or self._save_wanted or self._due(self.options.log_interval, self._eval_interval, *saves):
                self._log(window)
                if self._due(self._eval_interval) and not code:
                    code = self._validate()
                if code or self._gave_up or self._save_wanted or self._due(*saves):
                    self._save()
                    code = code or self._stop_requested()
                window = Window(time.monotonic())
            self.saver.poll()
            self.exports.poll(self.saver.last_saved)
        return self._shutdown(code)

    @property
    def _gave_up(self) -> bool:
        """Whether the run ends early, the same on every rank."""
        return self.saver.watch.gave_up(self.options)

    def _load(self) -> None:
        if self.plan.resume:
            self.iteration, self.consumed = state.load(self.engine)
            self.saver.last_saved = self.iteration
            ranks.print_rank_0(f"resumed at iteration {self.iteration}, after {self.consumed:,} rows")
        else:
            state.load_start(self.engine)
        keep_settings(self.plan)
        metrics.forget_after(self.options.save, self.iteration)
        name_best(self.plan, self.saver.watch)

    @property
    def _eval_interval(self) -> int:
        return self.options.eval_interval if self.plan.eval_iters else 0

    def _due(self, *intervals: int) -> bool:
        """Whether something that happens every so often and after the last step happens now; an interval of 0 is never."""
        last = self.iteration == self.plan.train_iters
        return any(interval and (last or self.iteration % interval == 0) for interval in intervals)

    def _stop_requested(self) -> int:
        """0, or the code of why some rank wants to end (see StopRequest.code); the same on every rank."""
        save, stop = self.requests.look()
        code = self.stop.code(self._longest_step + 1.2 * self._longest_save) or STOP_FILE * stop
        wish = self._all_reduce_max(2 * code + save)
        self._save_wanted = self._save_wanted or bool(wish % 2)
        return wish // 2

    def _all_reduce_max(self, number: int) -> int:
        """The largest of all ranks' numbers; every rank must call it."""
        if self._world > 1:
            numbers = torch.tensor(number, dtype=torch.int64)
            torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=self._group)
            number = int(numbers)
        return number

    def _validation_pending(self) -> bool:
        """Whether the validation after this iteration was interrupted, so that the checkpoint was saved without it."""
        due = self._due(self._eval_interval) if self.iteration else self.options.validate_at_start
        loss = [metrics.logged_validation(self.options.save, self.iteration) if due and ranks.is_rank_0() else None]
        torch.distributed.broadcast_object_list(loss, src=0, group=self._group)
        watch = self.saver.watch
        if loss[0] is not None and watch.validated != self.iteration:
            # It was made after the checkpoint was saved.
            self._take_validation(loss[0])
        return due and loss[0] is None

    def _take_validation(self, loss: float) -> None:
        watch = self.saver.watch
        watch.validation(self.iteration, loss)
        if self.saver.last_saved == self.iteration and watch.saved(self.iteration):
            name_best(self.plan, watch)

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
            scale = f"the loss scale of fp16 was too large and is {self._loss_scale():g} now"
            ranks.print_rank_0(f"iteration {number}: the gradient overflowed, the weights stay as they are: {scale}")
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
                experts=expert_values(self.engine.expert_load()),
            )
        )
        if self._all_reduce_max(self.saver.watch.steps(totals.loss, steps, self.options)):
            self._fail(
                f"the loss was above LOSS_CEILING={self.options.loss_ceiling:g} for {self.saver.watch.steps_above} steps, "
                f"{totals.loss:.4f} at iteration {self.iteration}: lower LR, look at the data, or resume from the last "
                "checkpoint with a higher LOSS_CEILING"
            )
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
        vocab_size = self.plan.architecture.vocab_size
        if not self.iteration and not means.pairs and means.loss >= GUESSING * math.log(vocab_size):
            ranks.print_rank_0(
                f"warning: no better than guessing one of {vocab_size:,} tokens (loss {math.log(vocab_size):.2f}): random "
                "weights, or data made with another model's tokenizer or template"
            )
        self._take_validation(means.loss)
        return 0

    def _save(self) -> None:
        watchdog.enter("save")
        started = time.monotonic()
        self.saver.spared = self.exports.needed
        self.saver.save(self.iteration, self.consumed)
        self.exports.saved(self.iteration)
        self._save_wanted = False
        self._longest_save = max(self._longest_save, time.monotonic() - started)
        self.picture.redraw()

    def _shutdown(self, code: int) -> int:
        watchdog.enter("save")
        self.saver.finish()
        finished = (self.iteration == self.plan.train_iters or self._gave_up) and not self._validation_pending()
        if code:
            self.exports.stop()
        else:
            watchdog.enter("export")
            self.exports.finish(self.saver.last_saved)
        self.stop.leave()
        watchdog.enter("exit")
        self.log.close()
        self.picture.close()
        if finished:
            say_last_words(self.plan, self.saver.watch, self.iteration)
            return 0
        kept = f"after iteration {self.iteration}, which is saved" if self.saver.last_saved else "before the first step"
        ranks.print_rank_0(f"stopped by {name_of(code)} {kept}: the same command continues from there (status {RESUME})")
        return RESUME
