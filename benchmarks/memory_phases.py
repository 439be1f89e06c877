"""The worker of `benchmarks.memory`: takes one case after another through all phases of a run, in this process."""

import contextlib
import faulthandler
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.memory_cases import AGAIN, SEARCH, case_arguments
from benchmarks.models import cut_architecture
from benchmarks.ours import benchmark_plan, randomize
from benchmarks.rows import make_rows
from benchmarks.train import CONVERSATIONS
from megatron.sft.model import process_groups
from megatron.sft.planning.memory import GIB, estimate
from megatron.sft.planning.memory_phases import PHASES
from megatron.sft.runtime import device, ranks
from megatron.sft.runtime.errors import UserError, first_line

# A process that still holds this much after a case ends with the status AGAIN, and another measures the rest.
_LEFT_OVER_BYTES = 1 << 30
# A case that takes longer ends its process, and the next one gets a fresh one.
_LONGEST_SECONDS = 180
_resumed: set[str] = set()


class Meter:
    """Peaks by phase, and what `plan` estimates: the most bytes of tensors while a call runs, and what is left after it.

    On a CPU they are counted from what torch's profiler sees of its allocator, which takes a second or more a step.
    """

    def __init__(self) -> None:
        self.estimates: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self.rests: dict[str, int] = {}
        self.current = ""
        self._profile: Any = None
        self._allocated = 0  # on a CPU, since this meter was made

    def measure(self, name: str, call: Callable[[], Any]) -> Any:
        """The call's result."""
        self.begin(name)
        result = call()
        self.end()
        return result

    def begin(self, name: str) -> None:
        """The phase `name` starts; another that has not ended, ends."""
        self.end()
        self.current = name
        if device.has_gpu():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()

    def end(self) -> None:
        """The current phase ends."""
        if not self.current:
            return
        if device.has_gpu():
            torch.cuda.synchronize()
            peak, rest = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        else:
            gc.collect()  # what is freed between two phases is not seen
            self._profile.__exit__(None, None, None)
            events = self._profile.profiler.kineto_results.events()
            sizes = [self._allocated, *(event.nbytes() for event in events if event.name() == "[memory]")]
            sums = list(itertools.accumulate(sizes))
            peak, rest = max(sums), sums[-1]
            self._allocated = rest
        self.peaks[self.current] = max(self.peaks.get(self.current, 0), peak)
        self.rests[self.current] = rest
        self.current = ""

    def take_largest(self) -> None:
        """Replace this process's figures by the largest of all processes; every one of them must call it."""
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, (self.peaks, self.rests))
        self.peaks = {name: max(peaks[name] for peaks, _ in found) for name in self.peaks}
        self.rests = {name: max(rests[name] for _, rests in found) for name in self.rests}


def measure_cases(cases: list[str], deadline: float) -> int:
    """Print a JSON line a case. Returns AGAIN if memory was left over, and the cases after it are for another process."""
    device.prepare()
    for case in cases:
        faulthandler.dump_traceback_later(_LONGEST_SECONDS, exit=True)
        result = {"case": case, "failed": "not run: no time left"} if time.time() > deadline else _measured(case)
        faulthandler.cancel_dump_traceback_later()
        if ranks.is_rank_0():
            print(json.dumps(result), flush=True)
        if _left_over() > _LEFT_OVER_BYTES:
            return AGAIN
    return 0


def _measured(case: str) -> dict[str, Any]:
    meter = Meter()
    result: dict[str, Any] = {"case": case, "device": device.device_name(), "torch": torch.__version__}
    try:
        result |= _phases(case, meter)
    except UserError as error:
        result["failed"] = str(error)
    except torch.OutOfMemoryError:
        result["failed"] = f"out of memory: {meter.current or 'between phases'}"
    except Exception as error:  # the other cases are still worth measuring
        result["failed"] = f"{type(error).__name__} ({meter.current or 'between phases'}): {first_line(error)}"
    meter.end()
    result["phases"] = _compared(meter)
    return result


def _compared(meter: Meter) -> dict[str, Any]:
    """GiB of each phase that was measured."""
    found = {}
    for name in (each for each in (*PHASES, SEARCH) if each in meter.peaks):
        of_plan = meter.estimates["forward and backward" if name == SEARCH else name]
        sizes = {"peak": meter.peaks[name], "rest": meter.rests[name], "estimate": of_plan}
        found[name] = {key: size / GIB for key, size in sizes.items()}
    return found


def _phases(case: str, meter: Meter) -> dict[str, Any]:
    arguments = case_arguments(case)
    architecture = cut_architecture(arguments)
    conversations = arguments.conversations or [size * arguments.row_length // 16384 for size in CONVERSATIONS]
    num_rows = 4 * arguments.micro_batches * arguments.layout.data_parallel(arguments.gpus)
    rows = make_rows(arguments.row_length, conversations, arguments.trained, architecture.vocab_size, num_rows)
    plan = benchmark_plan(arguments, rows)
    from megatron.sft.training.engine import memory_of

    settings = memory_of(plan)
    expected = estimate(architecture, plan.layout, plan.data_parallel, settings)
    meter.estimates = expected.phases()
    result = {"decides": expected.decides, "parts": {name: size / GIB for name, size in expected.parts().items()}}
    with process_groups.parallel(plan.layout):
        try:
            seconds = _run(plan, meter)
            meter.take_largest()
            held = torch.cuda.max_memory_reserved() / GIB if device.has_gpu() else None
        finally:
            _forget()
    return {**result, "seconds": statistics.median(seconds), "tokens": sum(c.tokens for c in rows.counts) // 4, "held": held}


def _run(plan: Any, meter: Meter) -> list[float]:
    """Every phase; returns the seconds of the steps after the first."""
    from megatron.sft.training.engine import Engine
    from megatron.sft.training.feeder import Feeder
    from megatron.sft.training.state import run_slices

    engine = meter.measure("building", partial(Engine, plan))
    meter.measure("building", partial(randomize, engine))
    feeder, seconds = Feeder(plan), []
    engine.optimizer.step = partial(_begin_and_step, meter, engine.optimizer.step)
    for step in range(plan.train_iters):
        batches = feeder.training(step * plan.options.global_batch_size)
        meter.begin("forward and backward" if step else "first step")
        started = time.perf_counter()
        engine.train_step(batches)
        device.synchronize()
        if step:
            seconds.append(time.perf_counter() - started)
        meter.end()
    del engine.optimizer.step
    meter.measure("validation", partial(engine.evaluate, batches[:1]))
    meter.measure(SEARCH, partial(engine.has_finite_gradients, batches[0]))
    meter.begin("saving")
    with engine.gathered_parameters():
        for part in run_slices(engine):
            part.values()
    meter.begin("end of the first run")
    del engine, batches, part
    _forget()
    meter.end()
    if (state := _state_of(plan)) not in _resumed:
        meter.measure("resuming", lambda: _resume(Engine(plan)))
        _resumed.add(state)
    return seconds


def _state_of(plan: Any) -> str:
    """What a resumed run's memory depends on. Filling it takes seconds, so that each is measured once."""
    options = plan.options
    settings = options.precision, options.optimizer_precision, options.optimizer_offload, options.lora_rank
    return repr((plan.architecture, plan.layout, plan.data_parallel, settings))


def _begin_and_step(meter: Meter, step: Callable[[], Any]) -> Any:
    meter.begin("optimizer step")
    return step()


def _resume(engine: Any) -> None:
    """What resuming does to memory, without a checkpoint: the state is allocated and filled, one parameter after another."""
    from megatron.sft.checkpoint.model_shards import to_slice
    from megatron.sft.checkpoint.optimizer_state import load_optimizer
    from megatron.sft.training.state import saved_tensors

    tensors = saved_tensors(engine)
    for tensor in tensors:
        to_slice(tensor).values().zero_()
    load_optimizer(engine.optimizer, tensors, lambda slices: None, {"step": 1})


def _forget() -> None:
    gc.collect()
    if device.has_gpu():
        torch.cuda.empty_cache()


def _left_over() -> int:
    """Bytes that are still allocated."""
    if "transformer_engine" in sys.modules and device.has_gpu():
        with contextlib.suppress(ImportError):
            from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

            FP8GlobalStateManager.reset()
    _forget()
    return torch.cuda.memory_allocated() if device.has_gpu() else 0
