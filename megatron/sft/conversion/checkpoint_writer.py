"""Writing a Megatron checkpoint of whole parameters, wherever they come from, with the manifest that names their source."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch

from megatron.sft.checkpoint.folder import TORCH, flush_and_hash, put_in_place, unfinished_path
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.parameters import Parameters, WatchedParameters
from megatron.sft.families.weight_names import weight_entries
from megatron.sft.hf.folder import architecture_record
from megatron.sft.model import process_groups
from megatron.sft.model.layout import Layout
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import check_free_space

# Files written at a time, each with one parameter in memory.
_NUM_FILES = 2


def requested_layout(arguments: argparse.Namespace) -> Layout:
    """The layout that a command line asks for."""
    return Layout(
        arguments.tensor_model_parallel_size,
        arguments.pipeline_model_parallel_size,
        expert_parallel=arguments.expert_model_parallel_size,
    )


def write_parameters(
    parameters: Parameters,
    architecture: Architecture,
    layout: Layout,
    ckpt_format: str,
    output: Path,
    iteration: int,
    finish: Callable[[Path], dict[str, Any]],
) -> None:
    """Write a checkpoint of whole parameters to the empty folder `output`.

    `finish(folder)` is called when all were read; it returns what the manifest says of their source, and may write further
    files into the folder, which is not finished yet.
    """
    watched = WatchedParameters(parameters, weight_entries(architecture), "convert")
    check_free_space(output, int(1.01 * watched.num_bytes), f"the checkpoint of {architecture.family}")
    staged = unfinished_path(output, iteration)
    staged.mkdir()
    if ckpt_format == TORCH:
        from megatron.sft.checkpoint import torch_format

        torch_format.save_parameters(staged, architecture, layout, watched, iteration)
        files = flush_and_hash(staged)
    else:
        files = _write_torch_dist(staged, architecture, watched)
    stated = finish(staged)
    files |= flush_and_hash(staged, known=files)
    manifest = {
        "checkpoint_format": ckpt_format,
        "shape": architecture_record(architecture),
        "layout": layout_record(layout),
        **stated,
        "files": files,
    }
    put_in_place(output, iteration, staged, manifest)


def _write_torch_dist(folder: Path, architecture: Architecture, parameters: Parameters) -> dict[str, dict[str, Any]]:
    """Write a whole model, each parameter fetched when its turn comes; returns the files for the manifest.

    megatron-core's own model, built without memory, must have the parameters of the family's table in the same shapes.
    """
    from megatron.sft.checkpoint.shard_slice import ShardSlice
    from megatron.sft.checkpoint.writing import write_index, write_slices
    from megatron.sft.model.config import transformer_config
    from megatron.sft.model.gpt import build_model
    from megatron.sft.model.live_weights import whole_weights

    with process_groups.parallel(Layout()), torch.device("meta"):
        config = transformer_config(architecture, Layout())
        live = whole_weights(build_model(architecture, Layout(), config), architecture)
    entries = list(weight_entries(architecture))
    # Layers and experts are leading dimensions of the stored tensor; the last entry of a key is the last of them.
    counts = {entry.stored_key: tuple(index + 1 for index in entry.place) for entry in entries}
    slices = []
    for entry in entries:
        meta, expected = parameters.meta(entry), live[entry.megatron].shape
        if meta.shape != expected:
            raise UserError(
                f"{entry.hf[0]} gives {tuple(meta.shape)} for {entry.megatron}, config.json implies "
                f"{tuple(expected)}: weights and configuration do not belong together"
            )
        offsets, sizes = (*entry.place, *(0,) * meta.dim()), (*(1,) * len(entry.place), *meta.shape)
        whole = (*counts[entry.stored_key], *meta.shape)
        # The dtype of the source, which may differ from tensor to tensor.
        slices.append(ShardSlice(entry.stored_key, offsets, sizes, whole, meta.dtype, partial(parameters.read, entry)))
    return write_index(folder, [write_slices(folder, 0, slices, Event(), _NUM_FILES)])


def layout_record(layout: Layout) -> dict[str, int]:
    """What the manifest says of the layout that a checkpoint was asked for."""
    record = {"tensor_parallel": layout.tensor_parallel, "pipeline_parallel": layout.pipeline_parallel}
    return {**record, "expert_parallel": layout.expert_parallel} if layout.expert_parallel > 1 else record
