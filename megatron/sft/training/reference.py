"""Making a reference's log-probabilities: forward passes over all rows in the run's own layout, before anything is trained.

Rank 0 writes those of a global batch at a time (`LogpsFile`), so that an interrupted pass continues.
"""

import contextlib
import gc
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron.sft.checkpoint.adapter_record import base_checksum
from megatron.sft.checkpoint.model_shards import load_weights
from megatron.sft.data.reference_logps import DTYPE, LogpsFile
from megatron.sft.data.tokenized import TokenizedRows, data_file
from megatron.sft.model.config import DTYPES, transformer_config
from megatron.sft.model.gpt import HeadResult, build_model
from megatron.sft.model.inputs import MicroBatch
from megatron.sft.model.pipeline import run_schedule
from megatron.sft.planning.reference_plan import ReferencePlan, made_logps, made_with
from megatron.sft.planning.run_plan import RunPlan, architecture_of, check_data_fits
from megatron.sft.runtime import device, output_lock, ranks, watchdog
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import check_free_space
from megatron.sft.runtime.signals import StopRequest
from megatron.sft.training.feeder import Feeder

_REPORT_SECONDS = 15.0
_APPEARS_SECONDS = 90.0


class StoppedError(Exception):
    """A signal or the time limit ended the pass; `args[0]` is the code of `StopRequest`."""


def with_logps(plan: RunPlan, stop: StopRequest) -> ReferencePlan:
    """The plan's reference with its log-probabilities, which are made where they are missing. Every rank calls it.

    `StoppedError` if it was asked to end; what was done is kept.
    """
    reference = plan.reference
    assert reference is not None
    found = _gathered(reference.logps is not None)
    if all(found):
        return reference
    if any(found):
        place = reference.places[0]
        raise UserError(
            f"some processes see the reference log-probabilities under {place} and others do not: set REFERENCE_LOGPS to a "
            "folder that all nodes share"
        )
    checkpoint = reference.checkpoint
    wanted = reference.wanted["checkpoint"]
    if checkpoint is None or base_checksum(checkpoint) != wanted["sha256"]:
        raise UserError(
            f"the reference log-probabilities of {wanted['path']} (checksum {wanted['sha256'][:12]}…) are gone, and so is that "
            "checkpoint: put one of them back, or set REFERENCE to where the checkpoint is now"
        )
    prefix = Path(_from_rank_0(lambda: str(_writable_place(reference, plan.rows))))
    lock = output_lock.held(prefix) if ranks.is_rank_0() else contextlib.nullcontext()
    with lock:
        _make(plan, reference, prefix, stop)
    path = data_file(prefix, "json")
    if not all(_gathered(_appears(path))):
        raise UserError(f"some nodes do not see {path}: set REFERENCE_LOGPS to a folder that all nodes share")
    return replace(reference, logps=made_logps(prefix, plan.rows, reference.wanted))


def _appears(path: Path) -> bool:
    """Whether a file is there that rank 0 has just written. Network file systems show it to others after a while."""
    until = time.monotonic() + _APPEARS_SECONDS
    while not path.exists() and time.monotonic() < until:
        watchdog.touch()
        time.sleep(1.0)
        os.listdir(path.parent)  # so that NFS asks again
    return path.exists()


def _gathered(value: bool) -> list[bool]:
    """The value of every rank."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _writable_place(reference: ReferencePlan, rows: TokenizedRows) -> Path:
    """The first place that can be written to."""
    size = rows.manifest["trained_tokens"] * DTYPE.itemsize
    for prefix in reference.places:
        try:
            prefix.parent.mkdir(parents=True, exist_ok=True)
            test = prefix.with_name(f".{prefix.name}.partial.bin")
            with open(test, "ab"):
                pass
        except OSError as error:
            ranks.print_rank_0(f"note: the reference log-probabilities cannot be kept in {prefix.parent} ({error.strerror})")
            continue
        check_free_space(prefix.parent, size, "the reference log-probabilities")
        return prefix
    raise UserError("there is no place for the reference log-probabilities: set REFERENCE_LOGPS to one that can be written to")


def _from_rank_0(call: Any) -> Any:
    """What the call gives on rank 0, on every rank; a `UserError` of it too."""
    answer: list[Any] = [None, None]
    if ranks.is_rank_0():
        try:
            answer = [call(), None]
        except UserError as error:
            answer = [None, str(error)]
    torch.distributed.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def _make(plan: RunPlan, reference: ReferencePlan, prefix: Path, stop: StopRequest) -> None:
    assert reference.checkpoint is not None
    watchdog.enter("reference log-probabilities")
    models = _models(plan, reference)
    file = LogpsFile(prefix, reference.wanted) if ranks.is_rank_0() else None
    feeder, size, num_rows = Feeder(plan), plan.options.global_batch_size, len(plan.rows)
    first = int(_from_rank_0(lambda: file.rows if file else 0))
    begun = f", continued at row {first:,}" if first else ""
    ranks.print_rank_0(f"reference log-probabilities of {reference.wanted['checkpoint']['path']}, {num_rows:,} rows{begun}")
    stop.begin(plan.options.exit_after_minutes)
    started = reported = time.monotonic()
    longest = 0.0
    for start in range(first, num_rows, size):
        begun_at = time.monotonic()
        values = _logps_of_rows(plan, models, feeder, list(range(start, min(start + size, num_rows))))
        watchdog.touch()
        if file:
            file.append(values, min(size, num_rows - start))
        now = time.monotonic()
        longest = max(longest, now - begun_at)
        code = _agreed_code(stop.code(longest + 1.0))
        if file and (code or now - reported >= _REPORT_SECONDS):
            file.keep()
            rate, reported = (file.rows - first) / (now - started), now
            print(f"reference: {file.rows:,} of {num_rows:,} rows, {(num_rows - file.rows) / rate:,.0f} s left", flush=True)
        if code:
            raise StoppedError(code)
    if file:
        file.finish(made_with(plan.layout))
        print(f"reference log-probabilities: {file.tokens:,} tokens in {data_file(prefix, 'bin')}", flush=True)
    torch.distributed.barrier()
    del models
    gc.collect()
    if device.has_gpu():
        torch.cuda.empty_cache()


def _models(plan: RunPlan, reference: ReferencePlan) -> list[torch.nn.Module]:
    """The reference's model chunks of this process: without gradients, optimizer, or recomputation."""
    checkpoint, options = reference.checkpoint, plan.options
    assert checkpoint is not None
    architecture = architecture_of(checkpoint)
    check_data_fits(plan.rows, options, architecture, checkpoint.manifest.get("source", {}))
    config = transformer_config(architecture, plan.layout, options.precision, options.fp8_recipe)
    chunks = [build_model(architecture, plan.layout, config, chunk) for chunk in range(plan.layout.virtual_pipeline)]
    modules: list[torch.nn.Module] = list(chunks)
    if DTYPES[options.precision] != torch.float32:
        modules = [Float16Module(config, chunk) for chunk in chunks]
    load_weights(checkpoint, chunks, plan.layout)
    # Frozen weights are cast to 8 bits once.
    return [module.eval().requires_grad_(False) for module in modules]


def _logps_of_rows(plan: RunPlan, models: list[torch.nn.Module], feeder: Feeder, numbers: list[int]) -> np.ndarray:
    """[trained tokens of the rows] float32, in the order of the rows; every rank gets them."""
    counts = plan.rows.trained_per_row[numbers]
    starts = dict(zip(numbers, (np.cumsum(counts) - counts).tolist(), strict=True))
    # Row by row: the numbers of rows that are computed together would depend on each other in the last digits.
    mine = feeder.single_rows(numbers)
    batches = [feeder.micro_batch([number]) for number in mine]
    found = torch.zeros(int(counts.sum()), dtype=torch.float32, device=device.current())
    with torch.no_grad():
        outputs = run_schedule(models, batches, _forward_step, forward_only=True)
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        for number, batch, output in zip(mine, batches, outputs, strict=False):
            if number is not None:
                found[starts[number] + _index_in_row(batch)] = output["logps"]
    # Each token's is on one process; the others add zero.
    torch.distributed.all_reduce(found)
    values = found.cpu().numpy()
    if len(bad := np.flatnonzero(~np.isfinite(values))):
        row = numbers[int(np.searchsorted(np.cumsum(counts), bad[0], side="right"))]
        raise UserError(
            f"the reference gives row {row} of {plan.rows.prefix} a log-probability of {values[bad[0]]}: its weights are "
            f"damaged, or PRECISION={plan.options.precision} is too narrow for them"
        )
    return values


def _index_in_row(batch: MicroBatch) -> Tensor:
    """[n] int64, where each of this rank's targets stands among those of all context-parallel ranks, in a batch of one row."""
    assert batch.pairs is not None
    counts = batch.pairs.num_trained.long()
    return (counts.cumsum(0) - counts)[batch.pairs.answers] + batch.pairs.places


def _forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    watchdog.touch()
    return model(batch=next(batches)), _report


def _report(result: HeadResult) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return result[0], torch.ones((), dtype=torch.int, device=result[0].device), {"logps": -result[1]}


def _agreed_code(code: int) -> int:
    """The largest of all ranks' codes."""
    codes = torch.tensor(code, dtype=torch.int64, device=device.current())
    torch.distributed.all_reduce(codes, torch.distributed.ReduceOp.MAX)
    return int(codes)
