"""The benchmark's own side: training steps through the engine and the feeder that train users' models."""

import argparse
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import peak_bytes
from benchmarks.models import cut_architecture
from benchmarks.rows import BenchmarkRows
from benchmarks.waiting import Shares, kernels_of, shares_of_all
from megatron.sft.checkpoint.folder import Checkpoint
from megatron.sft.checkpoint.torch_format import EMBEDDING, OUTPUT, padded
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.rules import tensor_parallel_part
from megatron.sft.families.sizes import weight_shape
from megatron.sft.model import process_groups
from megatron.sft.model.layout import Layout
from megatron.sft.model.live_weights import LiveWeight, is_adapter, live_weights
from megatron.sft.planning.options import TrainOptions
from megatron.sft.planning.run_plan import RunPlan
from megatron.sft.planning.trained_part import trained_part
from megatron.sft.runtime import device, ranks


def measure_steps(
    arguments: argparse.Namespace, rows: BenchmarkRows
) -> tuple[list[float], list[float], list[float], Shares | None]:
    """Seconds and losses of the timed steps, `peak_bytes` of the GPU with the most; with --communication what GPUs wait for.

    Every process of the run calls it. With --profile or --communication the first timed step is profiled instead of timed.
    """
    device.prepare()
    # Imported after `prepare`, which replaces names that megatron-core reads when it is imported.
    from megatron.sft.training.engine import Engine
    from megatron.sft.training.feeder import Feeder

    plan = benchmark_plan(arguments, rows)
    with process_groups.parallel(plan.layout):
        engine = Engine(plan)
        randomize(engine)
        feeder, size = Feeder(plan), plan.options.global_batch_size
        seconds, losses, consumed, shares = [], [], 0, None
        for step in range(arguments.warm_up + arguments.steps):
            batches = feeder.training(consumed)
            consumed += size
            if (arguments.profile or arguments.communication) and step == arguments.warm_up:
                shares = _profile(partial(engine.train_step, batches), arguments.profile if ranks.is_rank_0() else "")
                continue
            torch.cuda.synchronize()
            started = time.perf_counter()
            result = engine.train_step(batches)
            torch.cuda.synchronize()
            if step >= arguments.warm_up:
                seconds.append(time.perf_counter() - started)
                losses.append(result.loss.reduce()[0])
        peaks = torch.tensor(peak_bytes(), device=device.current(), dtype=torch.float64)
        torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
    return seconds, losses, peaks.tolist(), shares


def benchmark_plan(arguments: argparse.Namespace, rows: BenchmarkRows) -> RunPlan:
    """A run of these rows, as `resolve` would make it of data on disk."""
    architecture = cut_architecture(arguments)
    copies = arguments.layout.data_parallel(arguments.gpus)
    options = replace(
        TrainOptions(load=Path(), data_path=Path(), save=Path()),
        global_batch_size=arguments.micro_batches * copies,
        precision=arguments.precision,
        fp8_recipe=arguments.fp8_recipe,
        recompute=arguments.recompute,
        recompute_layers=arguments.recompute_layers,
        optimizer_precision=arguments.optimizer_precision,
        optimizer_offload=arguments.optimizer_offload,
        lora_rank=arguments.lora_rank,
        objective="sft" if arguments.stack == "sft" else arguments.objective,
    )
    steps = arguments.warm_up + arguments.steps
    return RunPlan(
        options=options,
        layout=arguments.layout,
        data_parallel=copies,
        architecture=architecture,
        start=Checkpoint(Path(), 0, "", {}),
        resume=False,
        rows=rows,  # type: ignore[arg-type]
        training_rows=np.arange(len(rows)),
        validation_rows=np.arange(0),
        train_iters=steps,
        warmup_iters=1,
        wsd_decay_iters=1,
        eval_iters=0,
        trained=trained_part(options, architecture),
    )


@torch.no_grad()
def randomize(engine: Any) -> None:
    """Weights as at the start of pretraining: normal with deviation 0.02; norms 1, biases 0. The same ones in every layout."""
    architecture, layout = engine.plan.architecture, engine.plan.layout
    for module in engine.chunks:
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            elif is_adapter(name):
                parameter.normal_(0.0, 0.02)
        for weight in live_weights(module, architecture, layout):
            if weight.values.dim() > 1:
                weight.values.copy_(_random_part(weight, architecture, layout))
    engine.optimizer.reload_model_params()


def _random_part(weight: LiveWeight, architecture: Architecture, layout: Layout) -> torch.Tensor:
    """This process's part of the weight, whose values follow from its name."""
    entry, parameter = weight.entry, weight.parameter
    generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(entry.megatron.encode()))
    shape = weight_shape(architecture, entry.rule)
    whole = torch.randn(shape, generator=generator, device=parameter.device, dtype=parameter.dtype).mul_(0.02)
    if entry.megatron in (EMBEDDING, OUTPUT):
        whole = padded(whole, layout.padded_vocab_size(architecture))
    if entry.expert is not None:
        group = parallel_state.get_expert_tensor_parallel_group()
    else:
        group = parallel_state.get_tensor_model_parallel_group()
    return tensor_parallel_part(entry.rule, whole, group.rank(), group.size())


def _profile(step: Callable[[], Any], path: str) -> Shares:
    """Write a table of one step's GPU time by kernel to `path`, or what happens when if it ends in .json, for Perfetto; nothing
    if it is empty. Returns what the GPUs of the run wait for."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        step()
        torch.cuda.synchronize()
    if path.endswith(".json"):
        profiler.export_chrome_trace(path)
    elif path:
        with open(path, "w", encoding="utf-8") as file:
            file.write(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=60, max_name_column_width=100))
    return shares_of_all(kernels_of(profiler))
