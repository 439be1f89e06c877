"""Training. `bash scripts/4_train.sh [train|resume|plan]` with settings in shell variables, which runs in every process

torchrun --nproc-per-node N -m megatron.sft.train [train|resume] --load CKPT --data-path PREFIX --save OUT …
"""

import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.sft import device, metrics, processes
from megatron.sft.errors import UserError, run
from megatron.sft.manifest import write_json
from megatron.sft.options import parse
from megatron.sft.row_order import RowOrder, num_torn_units
from megatron.sft.run_plan import RunPlan, describe, options_record, resolve

if TYPE_CHECKING:
    from megatron.sft.batches import MicroBatch
    from megatron.sft.training import Engine


def main() -> None:
    mode, options = parse()
    device.prepare()
    plan = resolve(mode, options, num_processes=int(os.environ.get("WORLD_SIZE", "1")))
    if mode == "plan":
        print(describe(plan, device.describe()))
        return
    processes.say(describe(plan, device.describe()))
    with processes.parallel(plan.layout, options.seed, options.distributed_timeout_minutes):
        _train(plan)


def _train(plan: RunPlan) -> None:
    from megatron.sft.checkpoint import training_state
    from megatron.sft.training import Engine

    options = plan.options
    engine = Engine(plan)
    iteration, consumed = 0, 0
    if plan.resume:
        iteration, consumed = training_state.load(engine)
        processes.say(f"resumed at iteration {iteration}, after {consumed:,} rows")
    else:
        training_state.load_start(engine)
    keep_settings(plan)
    metrics.forget_after(options.save, iteration)
    if iteration >= plan.train_iters:
        processes.say(f"nothing to do: the run has {plan.train_iters} steps and iteration {iteration} is saved")
        return
    feeder = Feeder(plan)
    log = metrics.MetricsLog(options.save, plan.train_iters, len(plan.training_rows), iteration)
    while iteration < plan.train_iters:
        iteration, consumed = _steps_until_log(engine, feeder, log, iteration, consumed)
        last = iteration == plan.train_iters
        if plan.eval_iters and (last or iteration % options.eval_interval == 0):
            validate(engine, feeder, log, iteration)
        if last or iteration % options.save_interval == 0:
            started = time.monotonic()
            folder = training_state.save(engine, iteration, consumed)
            processes.say(f"saved {folder} in {time.monotonic() - started:.1f} s")
    processes.say(
        f"done: {plan.train_iters} steps, checkpoints in {options.save}\nnext: scripts/5_export.sh {options.save}"
    )


def keep_settings(plan: RunPlan) -> None:
    """Keep the recipe and the resolved settings beside the checkpoints."""
    folder, recipe = plan.options.save, plan.options.recipe
    if processes.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        if recipe:
            shutil.copyfile(recipe, folder / Path(recipe).name)
        write_json(folder / "settings.json", options_record(plan.options))


def _steps_until_log(
    engine: "Engine", feeder: "Feeder", log: metrics.MetricsLog, iteration: int, consumed: int
) -> tuple[int, int]:
    """Train up to the next step that must be logged, validated or saved; returns the new (iteration, consumed rows)."""
    import torch

    plan, options = engine.plan, engine.plan.options
    started, first = time.monotonic(), iteration
    sums, tokens = None, 0
    while True:
        batches = feeder.training(consumed)
        result = engine.train_step(batches)
        tokens += sum(batch.num_tokens for batch in batches)
        sums = result.loss.values if sums is None else sums + result.loss.values
        iteration += 1
        consumed += options.global_batch_size
        intervals = (options.log_interval, options.eval_interval if plan.eval_iters else 0, options.save_interval)
        if iteration == plan.train_iters or any(n and iteration % n == 0 for n in intervals):
            break
    loss, trained = type(result.loss)(sums).reduce()
    seconds = (time.monotonic() - started) / (iteration - first)
    total = torch.tensor(tokens, dtype=torch.float64, device=device.current())
    torch.distributed.all_reduce(total)
    # Every model-parallel rank counted the tokens of its data-parallel copy.
    steps = iteration - first
    tokens = int(total.item()) // plan.layout.model_size // steps
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise UserError(
            f"the loss became {loss} at iteration {iteration}: lower LR, or look at the data with tools/show_sample"
        )
    world = torch.distributed.get_world_size()
    log.step(iteration, consumed, loss, result.lr, result.grad_norm, seconds, tokens, trained // steps, world)
    return iteration, consumed


def validate(engine: "Engine", feeder: "Feeder", log: metrics.MetricsLog, iteration: int) -> None:
    """Mean loss over the validation rows (or EVAL_ITERS global batches of them), the same rows every time."""
    sums = None
    for index in range(engine.plan.eval_iters):
        part = engine.evaluate(feeder.validation(index))
        sums = part.values if sums is None else sums + part.values
    assert sums is not None
    loss, trained = type(part)(sums).reduce()
    log.validation(iteration, loss, trained)


class Feeder:
    """Makes this process's micro-batches from positions in the data. Every rank of a model-parallel group reads the same."""

    def __init__(self, plan: RunPlan) -> None:
        from megatron.core import parallel_state

        self.plan = plan
        joined = plan.rows.joined[plan.training_rows]
        self.order = RowOrder(plan.training_rows, plan.options.seed, joined, plan.options.global_batch_size)
        if joined.any() and (torn := num_torn_units(self.order)):
            processes.say(f"{torn:,} groups are larger than a global batch, or do not all fit: they meet in two")
        self.rank = parallel_state.get_data_parallel_rank()
        # Sequence parallelism splits a micro-batch into equal parts; GPU kernels like multiples of 128.
        tensor_parallel = plan.layout.tensor_parallel if plan.layout.sequence_parallel else 1
        self.alignment = (128 if device.has_gpu() else 1) * tensor_parallel
        self.device = device.current()  # a thread of its own would have the first GPU
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._ahead: dict[int, Future[list[MicroBatch]]] = {}

    def training(self, consumed: int) -> list["MicroBatch"]:
        """The micro-batches of the step that starts after `consumed` rows; the next step's are made meanwhile."""
        size = self.plan.options.global_batch_size
        due = self._ahead.pop(consumed, None) or self._worker.submit(self._training, consumed)
        self._ahead = {consumed + size: self._worker.submit(self._training, consumed + size)}
        return due.result()

    def _training(self, consumed: int) -> list["MicroBatch"]:
        return self._batches([self.order.at(consumed + i) for i in range(self.plan.options.global_batch_size)])

    def validation(self, index: int) -> list["MicroBatch"]:
        """The micro-batches of the `index`-th global batch of validation rows; missing rows at the end are blank."""
        size = self.plan.options.global_batch_size
        numbers = [int(n) for n in self.plan.validation_rows[index * size : (index + 1) * size]]
        return self._batches([*numbers, *[None] * (size - len(numbers))])

    def _batches(self, numbers: "list[int | None] | list[int]") -> list["MicroBatch"]:
        from megatron.sft.batches import blank_row, make_micro_batch

        options, copies = self.plan.options, self.plan.data_parallel
        batches = []
        for index in range(self.plan.micro_batches):
            first = (index * copies + self.rank) * options.micro_batch_size
            rows = [
                blank_row() if number is None else self.plan.rows[number]
                for number in numbers[first : first + options.micro_batch_size]
            ]
            batches.append(make_micro_batch(rows, self.alignment, options.loss_average, self.device))
        return batches


if __name__ == "__main__":
    run(main)
