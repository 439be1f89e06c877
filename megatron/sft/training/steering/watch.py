"""What the validations and losses of a run have come to: which checkpoint is the best, and whether the run has gone wrong.

A checkpoint's manifest holds it, so that a resumed run decides as one that was not interrupted.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from megatron.sft.checkpoint.folder import iteration_path
from megatron.sft.planning.options import TrainOptions
from megatron.sft.planning.run_plan import RunPlan
from megatron.sft.training.same_run import data_record

KEY = "watch"  # in the manifest's `training`


@dataclass
class Watch:
    """All ranks hold the same one.

    compares: what validation losses are of; those of other rows are not compared. lowest, since: the lowest validation loss,
    and how many validations came after it. validated, validation_loss: the last validation. best, best_loss: the checkpoint
    with the lowest loss. steps_above: steps in a row whose training loss was above LOSS_CEILING.
    """

    compares: str
    lowest: float | None = None
    since: int = 0
    validated: int = -1
    validation_loss: float | None = None
    best: int | None = None
    best_loss: float | None = None
    steps_above: int = 0

    def validation(self, iteration: int, loss: float) -> None:
        """Take the validation after `iteration` steps. A loss that is not finite is never the lowest."""
        self.validated, self.validation_loss = iteration, loss if math.isfinite(loss) else None
        if math.isfinite(loss) and (self.lowest is None or loss < self.lowest):
            self.lowest, self.since = loss, 0
        else:
            self.since += 1

    def saved(self, iteration: int) -> bool:
        """The checkpoint of `iteration` is written: whether it is the best from now on."""
        loss = self.validation_loss if self.validated == iteration else None
        if loss is None or (self.best_loss is not None and loss >= self.best_loss):
            return False
        self.best, self.best_loss = iteration, loss
        return True

    def gave_up(self, options: TrainOptions) -> bool:
        """Whether EARLY_STOP_PATIENCE validations in a row have not lowered the loss."""
        return 0 < options.early_stop_patience <= self.since

    def steps(self, loss: float, num_steps: int, options: TrainOptions) -> bool:
        """Take `num_steps` steps with this mean loss: whether LOSS_CEILING_PATIENCE in a row were above LOSS_CEILING."""
        if not options.loss_ceiling:
            return False
        self.steps_above = self.steps_above + num_steps if loss > options.loss_ceiling else 0
        return self.steps_above >= options.loss_ceiling_patience

    def record(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


def watch_of(plan: RunPlan) -> Watch:
    """The watch of a new run, or that of the checkpoint that a resumed one starts from, as far as it compares the same rows."""
    options = plan.options
    rows = data_record(plan)
    what = (rows["bin_sha256"], rows["idx_sha256"], options.split, options.seed, plan.eval_iters, options.global_batch_size)
    fresh = Watch(compares=" ".join(map(str, (*what, options.loss_average))))
    saved = plan.start.manifest.get("training", {}).get(KEY) if plan.resume else None
    if not saved or saved.get("compares") != fresh.compares:
        return fresh
    watch = Watch(**{name: saved[name] for name in asdict(fresh) if name in saved})
    if watch.best is not None and not iteration_path(options.save, watch.best).is_dir():
        watch.best = watch.best_loss = None  # it was removed by hand
    return watch
