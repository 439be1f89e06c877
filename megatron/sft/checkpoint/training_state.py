"""Saving and loading a run: weights, optimizer state, random generators, and the position in the data."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron.sft import device
from megatron.sft.checkpoint import torch_dist
from megatron.sft.checkpoint.folder import TORCH_DIST, Checkpoint, write_checkpoint
from megatron.sft.checkpoint.weights_io import load_weights
from megatron.sft.errors import UserError
from megatron.sft.run_plan import RunPlan, options_record
from megatron.sft.training import Engine


def save(engine: Engine, iteration: int, consumed_rows: int) -> Path:
    """Write a checkpoint of the run at `iteration` into its output folder, with all processes."""
    plan = engine.plan
    with engine.gathered_parameters():
        model = torch_dist.model_state(engine.module)
        state = {
            "model": model,
            "optimizer": engine.optimizer.sharded_state_dict(model, metadata=torch_dist.METADATA),
            "random": _random_state(),
        }
        return write_checkpoint(
            plan.options.save, iteration, _manifest(plan, consumed_rows), lambda folder: torch_dist.save(folder, state)
        )


def load_start(engine: Engine) -> None:
    """Weights only, from the converted model: iteration 0 of a run."""
    load_weights(engine.plan.start, engine.module, engine.plan.layout)
    engine.optimizer.reload_model_params()


def load(engine: Engine) -> tuple[int, int]:
    """Continue from the plan's checkpoint; returns (iteration, consumed rows)."""
    checkpoint = engine.plan.start
    training = checkpoint.manifest.get("training")
    if checkpoint.format != TORCH_DIST or training is None:
        raise UserError(f"{checkpoint.path} has no training state to resume from: start a new run with it (train)")
    _check_same_run(checkpoint, engine.plan)
    _initialise_moments(engine)
    model = torch_dist.model_state(engine.module)
    state: dict[str, Any] = {
        "model": model,
        "optimizer": engine.optimizer.sharded_state_dict(model, is_loading=True, metadata=torch_dist.METADATA),
    }
    same_processes = training["num_processes"] == torch.distributed.get_world_size()
    if same_processes:
        state["random"] = _random_state()
    loaded = torch_dist.load(checkpoint.path, state)
    engine.module.load_state_dict(loaded["model"], strict=False)
    _load_optimizer(engine, loaded["optimizer"])
    if same_processes:
        _set_random_state(loaded["random"])
    engine.schedule.step(checkpoint.iteration)
    return checkpoint.iteration, int(training["consumed_rows"])


def _manifest(plan: RunPlan, consumed_rows: int) -> dict[str, Any]:
    start = plan.start.manifest
    layout = plan.layout
    return {
        "checkpoint_format": TORCH_DIST,
        **{key: start[key] for key in ("shape", "source", "hf_dtype", "hf_dtype_exceptions") if key in start},
        "layout": {"tensor_parallel": layout.tensor_parallel, "pipeline_parallel": layout.pipeline_parallel},
        "training": {
            "consumed_rows": consumed_rows,
            "num_processes": torch.distributed.get_world_size(),
            "train_iters": plan.train_iters,
            "options": options_record(plan.options),
            "data": _data_record(plan),
            "chat_template": plan.rows.manifest.get("chat_template"),
        },
    }


def _data_record(plan: RunPlan) -> dict[str, Any]:
    """What an exported model's card says of the data, and where its answers end."""
    data = plan.rows.manifest
    counts: dict[str, Any] = {
        name: data[name] for name in ("rows", "conversations", "tokens", "trained_tokens") if name in data
    }
    ends = data.get("tokenizer", {}).get("end_of_turn_ids", [])
    return {
        "prefix": str(plan.rows.prefix),
        "bin_sha256": data["files"]["bin"]["sha256"],
        "end_of_turn_ids": ends,
        **counts,
    }


def _check_same_run(checkpoint: Checkpoint, plan: RunPlan) -> None:
    """Refuse to continue with other data or another order of it: the position would mean something else."""
    training = checkpoint.manifest["training"]
    before, now = training["options"], options_record(plan.options)
    for name in ("seed", "global_batch_size", "split", "loss_average"):
        if before[name] != now[name]:
            raise UserError(
                f"{name.replace('_', '-')} was {before[name]} in {checkpoint.path} and is {now[name]} now: "
                "set it back to resume, or start a new run in another OUTPUT_PATH"
            )
    spread_before, spread = (int(o.get("expert_model_parallel_size", 1)) for o in (before, now))
    if (spread_before > 1) != (spread > 1):
        # Spread experts have an optimizer of their own in megatron-core.
        raise UserError(
            f"EXPERT_PARALLEL_SIZE was {spread_before} in {checkpoint.path} and is {spread} now: a run resumes from 1 to 1, "
            "or from any size above 1 to another: set it so, or start a new run in another OUTPUT_PATH"
        )
    old, new = training["data"]["bin_sha256"], plan.rows.manifest["files"]["bin"]["sha256"]
    if old != new:
        raise UserError(
            f"{checkpoint.path} was trained on data with checksum {old[:12]}…, {plan.rows.prefix}.bin has {new[:12]}…: "
            "resume with the same data, or start a new run in another OUTPUT_PATH"
        )


def _inner_optimizers(engine: Engine) -> list[DistributedOptimizer]:
    return list(engine.optimizer.chained_optimizers)


def _keeps_step_as_state(optimizer: DistributedOptimizer) -> bool:
    # torch's AdamW keeps `step` beside each parameter's moments, FusedAdam once in the parameter group.
    return isinstance(optimizer.optimizer, torch.optim.AdamW)


def _initialise_moments(engine: Engine) -> None:
    """Give torch's AdamW its (empty) state, which megatron-core reads the shapes and `step` from before it loads."""
    for optimizer in _inner_optimizers(engine):
        if not _keeps_step_as_state(optimizer):
            continue
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter.data),
                    "exp_avg_sq": torch.zeros_like(parameter.data),
                }


def _load_optimizer(engine: Engine, loaded: dict[Any, Any]) -> None:
    optimizers = _inner_optimizers(engine)
    if not _keeps_step_as_state(optimizers[0]):
        engine.optimizer.load_state_dict(loaded)
        return
    # A mixture of experts has a second optimizer, for the experts.
    parts = [loaded] if len(optimizers) == 1 else [loaded[number] for number in range(len(optimizers))]
    for optimizer, part in zip(optimizers, parts, strict=True):
        _load_moments(optimizer, part)


def _load_moments(optimizer: DistributedOptimizer, loaded: dict[str, Any]) -> None:
    """Load the state of one optimizer around torch's AdamW."""
    # megatron-core copies every state tensor from the checkpoint and stumbles over `step`, which is not in it; it also
    # gives all parameters one and the same `step` tensor, which each of them would then count up.
    moments = loaded.pop("param_state")
    optimizer.load_state_dict(loaded)
    states = optimizer.optimizer.state
    steps = {parameter: state.pop("step") for parameter, state in states.items()}
    optimizer.load_parameter_state_from_fully_reshardable(moments)
    for parameter, step in steps.items():
        states[parameter]["step"] = step.clone()


def _random_state() -> dict[str, ShardedTensor]:
    """The generators' states of every process, to be restored where the number of processes is the same."""
    states = {"torch": torch.get_rng_state()}
    if device.has_gpu():
        states["cuda"] = torch.cuda.get_rng_state()
        states.update({f"tracker.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()})
    place = (0, torch.distributed.get_rank(), torch.distributed.get_world_size())
    return {
        name: ShardedTensor.from_rank_offsets(f"random.{name}", state.cpu(), place, prepend_axis_num=1)
        for name, state in states.items()
    }


def _set_random_state(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    if device.has_gpu():
        torch.cuda.set_rng_state(states["cuda"])
        prefix = "tracker."
        get_cuda_rng_tracker().set_states(
            {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
        )
