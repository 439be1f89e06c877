"""What is said when the GPU's memory is full: in which phase, which part is larger than planned, and what would fit."""

from typing import TYPE_CHECKING, Any

import torch

from megatron.sft.checkpoint.optimizer_state import inner_optimizers
from megatron.sft.planning.fitting.changes import Candidate, changes_text
from megatron.sft.planning.memory import GIB, estimate
from megatron.sft.planning.memory_phases import MemoryEstimate
from megatron.sft.planning.run_plan import RunPlan
from megatron.sft.runtime import device
from megatron.sft.training.engine import memory_of

if TYPE_CHECKING:
    from megatron.sft.training.engine import Engine

# Of another process on the same GPU: less may be this process's own CUDA context.
_SHARED_BYTES = 2 * GIB
_PHASES = {
    "start-up": "building",
    "optimizer": "optimizer step",
    "save": "saving",
    "search for numbers that are not finite": "looking for a bad row",
}
_PASSES = "activations and working memory"


def out_of_memory_text(plan: RunPlan, engine: "Engine | None", part: str, wanted: str) -> str:
    """The message after torch's error `wanted`, in one line. part: `watchdog.current_part()`."""
    free, total = torch.cuda.mem_get_info()
    others = max(0, total - free - torch.cuda.memory_reserved() - GIB)
    held = held_parts(engine, torch.cuda.memory_allocated())
    return full_text(plan, _PHASES.get(part, part), held, total, others, wanted)


def full_text(plan: RunPlan, phase: str, held: dict[str, int], gpu_bytes: int, others: int, wanted: str) -> str:
    """held: as of `held_parts`, where the model was built. others: bytes that other processes hold on this GPU."""
    settings = memory_of(plan)
    expected = estimate(plan.architecture, plan.layout, plan.data_parallel, settings)
    planned = _planned(expected)
    text = f"the GPU's memory of {gpu_bytes / GIB:.1f} GiB is full in {phase} ({wanted})"
    if held:
        parts = ", ".join(f"{name} {size / GIB:.1f} (plan: {planned[name] / GIB:.1f})" for name, size in held.items())
        grown = max(held, key=lambda name: held[name] - planned[name])
        more = held[grown] - planned[grown]
        # A twentieth is what an estimate may be wrong by.
        what = f"{grown} took {more / GIB:.1f} GiB more than planned" if more > 0.05 * planned[grown] + GIB / 16 else ""
        text += f": {parts}{f'; {what}' if what else ''}"
    if others > _SHARED_BYTES:
        text += f"; other processes hold {others / GIB:.1f} GiB of this GPU"
    # As much less than planned as was missing, so that what is estimated to fit does.
    excess = max(1.0, sum(held.values()) / max(1, expected.tensors))
    room = min((gpu_bytes - (others if others > _SHARED_BYTES else 0)) / excess, expected.total / 0.96 - GIB / 4)
    processes = plan.data_parallel * plan.layout.model_size
    asked = plan.options.recompute, plan.options.recompute_layers
    start = Candidate(plan.architecture, plan.layout, processes, plan.options.global_batch_size, settings, asked)
    return f"{text}: {changes_text(start, int(room))}"


def held_parts(engine: "Engine | None", allocated: int) -> dict[str, int]:
    """Bytes on this process's device of what `plan` estimates, by its names; the rest of `allocated` is of the passes."""
    if engine is None:
        return {}
    seen: dict[int, int] = {}
    buffers = [buffer for model in engine.models for buffer in [*model.buffers, *model.expert_parallel_buffers]]
    groups = [group for inner in inner_optimizers(engine.optimizer) for group in inner.optimizer.param_groups]
    states = [value for inner in inner_optimizers(engine.optimizer) for value in inner.optimizer.state.values()]
    parts = {
        "weights": _bytes((parameter for model in engine.models for parameter in model.parameters()), seen),
        "gradients": _bytes((buffer.grad_data for buffer in buffers), seen),
        "optimizer": _bytes((each for group in groups for each in group["params"]), seen)
        + _bytes((each for state in states for each in state.values() if isinstance(each, torch.Tensor)), seen),
    }
    return {**parts, _PASSES: max(0, allocated - sum(parts.values()))}


def _bytes(tensors: Any, seen: dict[int, int]) -> int:
    """Of storages on this process's device that are not among `seen`, to which they are added."""
    before = sum(seen.values())
    for tensor in tensors:
        if tensor.device == device.current():
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values()) - before


def _planned(expected: MemoryEstimate) -> dict[str, int]:
    kept = {name: getattr(expected, name) for name in ("weights", "gradients", "optimizer")}
    return {**kept, _PASSES: expected.activations + expected.working}
