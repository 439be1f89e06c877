"""Writing a Megatron checkpoint of whole parameters, from wherever they come, with the manifest that tells where that was."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.sft.checkpoint import folder as checkpoint_folder
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.casting import NAMES
from megatron.sft.families.parameters import Parameters, WatchedParameters
from megatron.sft.families.weight_names import weight_entries
from megatron.sft.hf.folder import architecture_record, dtype_name
from megatron.sft.model import process_groups
from megatron.sft.model.layout import Layout
from megatron.sft.runtime.manifest import check_free_space


def layout_of(arguments: argparse.Namespace) -> Layout:
    """The layout that was asked for on the command line."""
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
    finish: Callable[[], dict[str, Any]],
) -> None:
    """Write a checkpoint of whole parameters. `finish()` gives, when all were read, what the manifest says of their source."""
    with process_groups.parallel(Layout()):
        from megatron.sft.checkpoint import torch_dist, torch_format

        watched = WatchedParameters(parameters, weight_entries(architecture), "convert")
        check_free_space(output, int(1.01 * watched.num_bytes), f"the checkpoint of {architecture.family}")
        manifest: dict[str, Any] = {
            "checkpoint_format": ckpt_format,
            "shape": architecture_record(architecture),
            "layout": layout_record(layout),
        }

        def write(folder: Path) -> None:
            if ckpt_format == checkpoint_folder.TORCH:
                torch_format.save_parameters(folder, architecture, layout, watched, iteration)
            else:
                torch_dist.save_parameters(folder, architecture, watched)
            manifest.update(finish())

        checkpoint_folder.write_checkpoint(output, iteration, manifest, write)


def layout_record(layout: Layout) -> dict[str, int]:
    """What the manifest says of the layout that a checkpoint was asked for."""
    record = {"tensor_parallel": layout.tensor_parallel, "pipeline_parallel": layout.pipeline_parallel}
    return {**record, "expert_parallel": layout.expert_parallel} if layout.expert_parallel > 1 else record


def converted_config(config: dict[str, Any], architecture: Architecture, dtype: str | None) -> dict[str, Any]:
    """config.json as it describes the converted model: with the rows that were added, and the dtype that was asked for."""
    result = dict(config)
    if architecture.vocab_size != config["vocab_size"]:
        result["vocab_size"] = architecture.vocab_size
    if dtype is not None:
        field = "torch_dtype" if "torch_dtype" in result else "dtype"
        result[field] = dtype_name(NAMES[dtype])
    return result
