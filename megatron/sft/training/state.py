"""The state of a run: weights, optimizer, fp8 scales, random generators, counters, and the position in the data."""

from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron.sft.checkpoint.adapter_record import lora_record
from megatron.sft.checkpoint.adapter_shards import adapter_tensors, fill_adapters
from megatron.sft.checkpoint.folder import TORCH_DIST
from megatron.sft.checkpoint.fp8_state import load_scaling, scaling_slices
from megatron.sft.checkpoint.model_shards import load_weights, model_tensors, tensors_to_write, to_slice
from megatron.sft.checkpoint.optimizer_state import load_optimizer, optimizer_record, optimizer_slices
from megatron.sft.checkpoint.reading import SliceReader
from megatron.sft.checkpoint.shard_slice import ShardSlice
from megatron.sft.planning.options import options_record
from megatron.sft.planning.run_plan import RunPlan
from megatron.sft.runtime import device, ranks
from megatron.sft.training.adapter_start import first_values
from megatron.sft.training.engine import Engine
from megatron.sft.training.same_run import check_same_run, data_record, reference_record
from megatron.sft.training.steering.watch import KEY as WATCH
from megatron.sft.training.steering.watch import Watch


def run_slices(engine: Engine) -> list[ShardSlice]:
    """What this process writes of a checkpoint. The engine's parameters must be gathered while `values()` are called."""
    tensors = saved_tensors(engine)
    weights = [to_slice(tensor) for tensor in tensors_to_write(tensors)]
    others = [*scaling_slices(engine.chunks), *_random_slices(_random_states())]
    return [*weights, *optimizer_slices(engine.optimizer, tensors), *others]


def saved_tensors(engine: Engine) -> list[ShardedTensor]:
    """The weights that a checkpoint of the run holds: all of them, or the adapters alone."""
    return adapter_tensors(engine.chunks) if engine.plan.trained.lora else model_tensors(engine.chunks)


def run_manifest(engine: Engine, consumed_rows: int, watch: Watch) -> dict[str, Any]:
    """What the manifest says besides the files. `consumed_rows`: the position in the data."""
    plan, start = engine.plan, engine.plan.start.manifest
    lora, base = plan.trained.lora, plan.base
    return {
        "checkpoint_format": TORCH_DIST,
        **({"adapter": lora_record(lora, base)} if lora and base else {}),
        **{key: start[key] for key in ("shape", "source", "hf_dtype", "hf_dtype_exceptions") if key in start},
        "layout": _layout(plan),
        "training": {
            "consumed_rows": consumed_rows,
            "num_processes": torch.distributed.get_world_size(),
            "train_iters": plan.train_iters,
            "counters": dict(engine.counters),
            WATCH: watch.record(),
            "optimizer": optimizer_record(engine.optimizer),
            "options": options_record(plan.options),
            "data": data_record(plan),
            **({"reference": reference_record(plan)} if plan.reference else {}),
            "chat_template": plan.rows.manifest.get("chat_template"),
            "tool_use_template": plan.rows.manifest.get("tool_use_template"),
        },
    }


def load_start(engine: Engine) -> None:
    """Load the weights of the converted model, and the adapters' first values: iteration 0 of a run."""
    plan = engine.plan
    load_weights(plan.start, engine.chunks, plan.layout)
    if plan.trained.lora:
        fill_adapters(engine.optimizer, adapter_tensors(engine.chunks), first_values(plan.options))
    else:
        engine.optimizer.reload_model_params()


def load(engine: Engine) -> tuple[int, int]:
    """Load everything from the plan's checkpoint to continue its run; returns (iteration, consumed rows).

    A checkpoint without training state, or of a run that `check_same_run` refuses, is a `UserError`.
    """
    checkpoint = engine.plan.start
    for change in check_same_run(checkpoint, engine.plan):
        ranks.print_rank_0(change)
    training = checkpoint.manifest["training"]
    if engine.plan.base:
        load_weights(engine.plan.base, engine.chunks, engine.plan.layout)
    reader = SliceReader(checkpoint.path)
    tensors = saved_tensors(engine)
    reader.fill([to_slice(tensor) for tensor in tensors])
    # An optimizer whose steps were skipped has taken fewer than the schedule.
    record = training.get("optimizer", {"step": checkpoint.iteration})
    load_optimizer(engine.optimizer, tensors, reader.fill, record)
    load_scaling(engine.chunks, reader)
    same_processes = training["num_processes"] == torch.distributed.get_world_size()
    if same_processes and checkpoint.manifest["layout"] == _layout(engine.plan):
        _load_random_states(reader)
    engine.counters.update(training.get("counters", {}))
    engine.schedule.step(checkpoint.iteration)
    return checkpoint.iteration, int(training["consumed_rows"])


def _layout(plan: RunPlan) -> dict[str, int]:
    layout = plan.layout
    return {
        "tensor_parallel": layout.tensor_parallel,
        "pipeline_parallel": layout.pipeline_parallel,
        "context_parallel": layout.context_parallel,
        "expert_parallel": layout.expert_parallel,
        "data_parallel": plan.data_parallel,
    }


def _random_states() -> dict[str, torch.Tensor]:
    states = {"torch": torch.get_rng_state()}
    if device.has_gpu():
        states["cuda"] = torch.cuda.get_rng_state()
        states.update({f"tracker.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()})
    return {f"random.{name}": state.cpu() for name, state in states.items()}


def _random_slices(states: dict[str, torch.Tensor]) -> list[ShardSlice]:
    """[processes, bytes] of each generator, a row for every process; restored if a run continues in the same layout."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return [
        ShardSlice(key, (rank, 0), (1, len(state)), (world, len(state)), state.dtype, partial(states.__getitem__, key))
        for key, state in states.items()
    ]


def _load_random_states(reader: SliceReader) -> None:
    # A run that started on another kind of device has other generators.
    states = {key: torch.empty_like(state) for key, state in _random_states().items() if key in reader}
    reader.fill(_random_slices(states))
    torch.set_rng_state(states["random.torch"])
    if device.has_gpu() and "random.cuda" in states:
        torch.cuda.set_rng_state(states["random.cuda"])
        prefix = "random.tracker."
        get_cuda_rng_tracker().set_states(
            {key.removeprefix(prefix): state for key, state in states.items() if key.startswith(prefix)}
        )
