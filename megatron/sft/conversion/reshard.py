"""From one Megatron checkpoint to another: another layout, format or precision, weights only or with the optimizer's state."""

import argparse
import shutil
from pathlib import Path
from typing import Any

from megatron.sft.checkpoint.adapter_record import refuse_adapters
from megatron.sft.checkpoint.folder import TORCH_DIST, TRACKER, Checkpoint, iteration_path, open_checkpoint, verify_files
from megatron.sft.checkpoint.reading import stored_parameters
from megatron.sft.conversion.carried import FILE as CARRIED
from megatron.sft.conversion.checkpoint_writer import requested_layout, write_parameters
from megatron.sft.conversion.source_record import converted_config, read_dtype_record, source_model
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.parameters import DTYPE_OPTIONS, Caster, CastParameters, Parameters
from megatron.sft.hf.folder import HFFolder, dtype_name
from megatron.sft.hf.parameters import HFParameters
from megatron.sft.model.layout import check_layout
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import check_free_space, write_text


def reshard(source: Path, output: Path, arguments: argparse.Namespace) -> None:
    """Write the checkpoint of `source` to `output`, an empty folder, in the form that `arguments` (of convert) ask for."""
    checkpoint = open_checkpoint(source, arguments.iteration)
    refuse_adapters(checkpoint)
    verify_files(checkpoint)
    architecture, original = source_model(checkpoint, arguments.hf_dir if arguments.source else None)
    layout = requested_layout(arguments)
    check_layout(layout, architecture)
    if arguments.with_optimizer:
        _copy(checkpoint, arguments, output)
        return
    stored = stored_parameters(checkpoint, architecture, HFParameters(original, None) if original else None)
    caster = Caster()
    dtype = DTYPE_OPTIONS.get(arguments.dtype)
    parameters: Parameters = stored if dtype is None else CastParameters(stored, dtype, caster)

    def finish(folder: Path) -> dict[str, Any]:
        if (checkpoint.path / CARRIED).is_file():
            shutil.copyfile(checkpoint.path / CARRIED, folder / CARRIED)
        for line in (*getattr(stored, "notes", ()), *filter(None, [caster.report()])):
            print(line)
        return _manifest(checkpoint, original, architecture, arguments.dtype)

    write_parameters(parameters, architecture, layout, arguments.ckpt_format, output, checkpoint.iteration, finish)


def _manifest(
    checkpoint: Checkpoint, original: HFFolder | None, architecture: Architecture, dtype: str | None
) -> dict[str, Any]:
    """What is known of the weights' source, and of the training run if the checkpoint is one's."""
    existing = checkpoint.manifest
    source = existing.get("source") or (original.manifest_entry() if original else {})
    result = {
        "source": {**source, "config": converted_config(source["config"], architecture, dtype)},
        **read_dtype_record(checkpoint, original),
    }
    if dtype is not None:
        result |= {"hf_dtype": dtype_name(DTYPE_OPTIONS[dtype]), "hf_dtype_exceptions": {}}
    trained = existing.get("training") or existing.get("trained")
    if trained:
        result["trained"] = trained
    if "tensor_crc32" in existing and dtype is None:
        result["tensor_crc32"] = existing["tensor_crc32"]
    return result


def _copy(checkpoint: Checkpoint, arguments: argparse.Namespace, output: Path) -> None:
    """Copy the checkpoint as it is: torch_dist loads in any layout, optimizer state included."""
    if checkpoint.format != TORCH_DIST or arguments.ckpt_format != TORCH_DIST:
        raise UserError(
            f"{checkpoint.path} is {checkpoint.format}, asked for is {arguments.ckpt_format}: the optimizer's state is kept "
            "from torch_dist to torch_dist only; drop --with-optimizer, or keep the format"
        )
    if arguments.dtype:
        raise UserError(f"DTYPE={arguments.dtype} cannot be applied to optimizer state: drop one of the two")
    size = sum(path.stat().st_size for path in checkpoint.path.rglob("*") if path.is_file())
    check_free_space(output, size, f"a copy of {checkpoint.path}")
    shutil.copytree(checkpoint.path, iteration_path(output, checkpoint.iteration))
    write_text(output / TRACKER, str(checkpoint.iteration))
    print("copied with its optimizer state: torch_dist is read in any layout")
