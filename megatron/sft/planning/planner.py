"""What a run will need, for people: memory, disk and time, added to what its resolution says."""

import os
import shutil
from collections.abc import Callable
from typing import Any

from megatron.sft.planning import input_checks
from megatron.sft.planning.fitting.changes import Candidate, changes_text
from megatron.sft.planning.fitting.memory_fit import fewest_gpus_text, gpu_memory, memory_settings
from megatron.sft.planning.fitting.recomputing import recompute_words, with_cheapest_recompute
from megatron.sft.planning.memory import GIB, OFFLOADED_BYTES, MemorySettings, estimate
from megatron.sft.planning.objective_checks import needs_pairs
from megatron.sft.planning.options import TrainOptions
from megatron.sft.planning.resolution import Resolution, checkpoint_bytes
from megatron.sft.planning.speed.fp8_speed import fp8_advice
from megatron.sft.planning.speed.run_time import ESTIMATED, full_rows, measured_rows, tokens_per_second
from megatron.sft.planning.speed.step_time import step_time
from megatron.sft.planning.trained_sizes import num_trained
from megatron.sft.reporting.metrics import clock
from megatron.sft.runtime.manifest import Files, gigabytes

# Larger inputs would keep `plan` from answering in seconds: a disk reads some hundred megabytes a second.
CHECKED_BYTES = 2 << 30


def add_needs(found: Resolution) -> None:
    """Add checksums of small inputs, memory of a GPU, disk and time to the lines, and what does not fit to the problems."""
    architecture = found.architecture
    for checkpoint in filter(None, {id(each): each for each in (found.start, found.base)}.values()):
        if architecture and checkpoint.manifest.get("files"):
            files = {checkpoint.path / name: facts for name, facts in checkpoint.manifest["files"].items()}
            _check_sums(found, files, input_checks.check_checkpoint, checkpoint, architecture)
    if found.rows is not None:
        _check_sums(found, found.rows.files, input_checks.check_rows, found.rows, found.options.save)
    _add_memory(found)
    _add_disk(found)
    _add_time(found)
    if found.architecture and found.options.precision in ("bf16", "fp8"):
        found.add("fp8", fp8_advice(found.architecture, found.layout, found.trained.lora is not None))


def _check_sums(found: Resolution, files: Files, check: Callable[..., None], *arguments: Any) -> None:
    num_bytes = sum(facts["bytes"] for facts in files.values())
    if num_bytes <= CHECKED_BYTES:
        found.attempt(check, *arguments)
    else:
        folder = next(iter(files)).parent
        found.add("checksums", f"of {num_bytes / 1e9:.1f} GB in {folder}: compared when the run starts, not here")


def _settings(found: Resolution) -> MemorySettings | None:
    """What the memory depends on, RECOMPUTE=auto decided; None where too little is known."""
    options, layout = found.options, found.layout
    if found.architecture is None or not found.data_parallel or not found.seq_length or options.micro_batch_size < 1:
        return None
    if layout.pipeline_parallel * layout.virtual_pipeline > found.architecture.num_layers:
        return None
    settings = memory_settings(options, found.seq_length, found.data_parallel, found.trained)
    if settings.recompute != "auto":
        return settings
    gpu_bytes, _ = gpu_memory(options)
    return with_cheapest_recompute(found.architecture, layout, found.data_parallel, settings, gpu_bytes or 80 * GIB)


def _add_memory(found: Resolution) -> None:
    architecture, layout, options = found.architecture, found.layout, found.options
    here = _settings(found)
    if architecture is None or here is None:
        return
    settings = memory_settings(options, found.seq_length, found.data_parallel, found.trained)
    gpu_bytes, where = gpu_memory(options)
    chosen = " (chosen for 80 GB; give GPU_MEMORY_GIB)" if settings.recompute == "auto" and not gpu_bytes else ""
    needed = estimate(architecture, layout, found.data_parallel, here)
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needed.parts().items())
    stage = f" on pipeline stage {needed.stage}" if layout.pipeline_parallel > 1 else ""
    found.add("memory of a GPU", f"{needed.total / GIB:.1f} GiB{stage} with {recompute_words(here)}{chosen}: {parts}")
    phases = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needed.phases().items())
    found.add("memory by phase", f"{phases} GiB of tensors: {needed.decides} decides")
    if share := options.optimizer_offload:
        size = OFFLOADED_BYTES * share * num_trained(architecture, found.trained)
        found.add("CPU memory", f"{size / 1e9:.1f} GB of all processes together for {share:.0%} of the optimizer's state")
    if found.layout_fits:
        found.add("fits", fewest_gpus_text(architecture, layout, settings, options.global_batch_size))
    if gpu_bytes:
        found.add("GPU", f"{gpu_bytes / GIB:.1f} GiB, {where}")
    if gpu_bytes and not needed.fits(gpu_bytes):
        largest, size = max(needed.parts().items(), key=lambda part: part[1])
        asked = options.recompute, options.recompute_layers
        start = Candidate(architecture, layout, found.num_processes, options.global_batch_size, here, asked)
        found.problems.append(
            f"a GPU needs about {needed.total / GIB:.1f} GiB in {needed.decides}, {size / GIB:.1f} of it for {largest}, and "
            f"has {gpu_bytes / GIB:.1f} ({where}): {changes_text(start, gpu_bytes)}"
        )


def _add_disk(found: Resolution) -> None:
    if found.architecture is None:
        return
    folder = found.options.save
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    size = checkpoint_bytes(found.options, found.architecture, found.trained)
    kept = checkpoints_kept(found.options, found.train_iters)
    found.add("disk", f"{gigabytes(size)} a checkpoint, {kept} kept: {gigabytes(kept * size)} of {gigabytes(free)} free")
    if size <= free < kept * size:  # no room for even one is found with the settings
        found.problems.append(
            f"{kept} checkpoints of {gigabytes(size)} do not fit the {gigabytes(free)} free in {folder}: save less "
            "often (SAVE_INTERVALS), keep fewer (KEEP_LAST), make room, or set OUTPUT_PATH to another disk"
        )


def _add_time(found: Resolution) -> None:
    if found.architecture is None or not found.train_iters or not found.seq_length:
        return
    options = found.options
    load = measured_rows(found.rows) if found.rows is not None else full_rows(found.seq_length)
    settings = _settings(found)
    if settings is None:
        return
    two_heads = needs_pairs(options.objective)
    step = step_time(found.architecture, found.layout, found.data_parallel, settings, load, two_heads=two_heads)
    estimated = options.global_batch_size * load.tokens / step.total
    speed, where = tokens_per_second(options.tokens_per_second, options.save, estimated)
    tokens = found.train_iters * options.global_batch_size * load.tokens
    on_cpu = os.environ.get("MEGATRON_SFT_DEVICE") == "cpu"
    if where.startswith(ESTIMATED) and on_cpu:
        found.add("time", f"for {tokens / 1e9:,.3f} G tokens not known on a CPU: the first steps show it")
        return
    found.add("time", f"{clock(tokens / speed)} for {tokens / 1e9:,.3f} G tokens at {speed:,.0f} tokens/s ({where})")
    if step.launching > 0.1 * step.total and not on_cpu:
        more = f" or MICRO_BATCH_SIZE={2 * options.micro_batch_size}" if settings.num_micro_batches % 2 == 0 else ""
        found.add(
            "waiting",
            f"{step.launching / step.total:.0%} of a step, estimated, for the processor, which launches kernels more slowly "
            f"than they run: longer rows (SEQ_LENGTH, tools/repack){more} give each of them more to do",
        )
    if found.rows is not None and found.reference and not found.reference.logps:
        # A forward pass is a third of a step.
        tokens = found.rows.manifest["tokens"]
        found.add("reference pass", f"{clock(tokens / speed / 3)} for {tokens / 1e9:,.3f} G tokens, once before the first step")


def checkpoints_kept(options: TrainOptions, train_iters: int) -> int:
    """The most checkpoints on disk at one time: an old one is removed only when the next is whole."""
    saved = -(-train_iters // max(options.save_interval, 1)) if train_iters else 1
    return min(saved, options.keep_last + 1) if options.keep_last else saved
