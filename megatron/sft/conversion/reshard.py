"""From one Megatron checkpoint to another: another layout, format or precision, weights only or with the optimizer's state."""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.sft.checkpoint import folder as checkpoint_folder
from megatron.sft.checkpoint.folder import Checkpoint
from megatron.sft.checkpoint.stored_tensors import stored_parameters
from megatron.sft.conversion.checkpoint_writer import converted_config, layout_of, write_parameters
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.casting import NAMES, Caster
from megatron.sft.families.parameters import CastParameters, Parameters
from megatron.sft.families.registry import read_architecture
from megatron.sft.families.weight_names import check_hf_names
from megatron.sft.hf.folder import HFFolder, dtype_name
from megatron.sft.hf.parameters import HFParameters
from megatron.sft.model.layout import check_layout
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import check_free_space, write_text


def reshard(source: Path, output: Path, arguments: argparse.Namespace) -> None:
    """Write the checkpoint of `source` to `output`, an empty folder, in the form that `arguments` ask for."""
    checkpoint = checkpoint_folder.open_checkpoint(source, arguments.iteration)
    checkpoint_folder.verify_files(checkpoint)
    hf_dir: Path | None = arguments.hf_dir if arguments.source else None
    architecture, original = model_of(checkpoint, hf_dir)
    layout = layout_of(arguments)
    check_layout(layout, architecture)
    if arguments.with_optimizer:
        _copy(checkpoint, arguments, output)
        return
    stored = stored_parameters(checkpoint, architecture, HFParameters(original, None) if original else None)
    caster = Caster()
    dtype = NAMES.get(arguments.dtype)
    parameters: Parameters = stored if dtype is None else CastParameters(stored, dtype, caster)

    def finish() -> dict[str, Any]:
        for line in (*getattr(stored, "notes", ()), *filter(None, [caster.report()])):
            print(line)
        return _manifest(checkpoint, original, architecture, arguments.dtype)

    write_parameters(parameters, architecture, layout, arguments.ckpt_format, output, checkpoint.iteration, finish)


def model_of(checkpoint: Checkpoint, hf_dir: Path | None) -> tuple[Architecture, HFFolder | None]:
    """The architecture, from the checkpoint's manifest or, for one that has none, from the original model's folder."""
    config = checkpoint.manifest.get("source", {}).get("config")
    original = HFFolder(hf_dir) if hf_dir else None
    if config is not None:
        return read_architecture(config, str(checkpoint.path / checkpoint_folder.MANIFEST)), original
    if original is None:
        raise UserError(
            f"{checkpoint.path} has no manifest.json with the model's configuration: give the folder of the original model "
            "(HF_DIR for scripts/2_convert.sh)"
        )
    check_hf_names(original.architecture, original.tensor_names, str(original.path))
    return replace(original.architecture), original


def hf_dtypes(checkpoint: Checkpoint, original: HFFolder | None) -> tuple[str, dict[str, str]]:
    """The dtype that most of the Hugging Face tensors have, and the tensors that have another."""
    if "hf_dtype" in checkpoint.manifest:
        return str(checkpoint.manifest["hf_dtype"]), dict(checkpoint.manifest["hf_dtype_exceptions"])
    assert original is not None
    dtypes = {name: dtype_name(original.dtype_and_shape(name)[0]) for name in original.tensor_names}
    common = max(sorted(set(dtypes.values())), key=list(dtypes.values()).count)
    return common, {name: dtype for name, dtype in dtypes.items() if dtype != common}


def _manifest(
    checkpoint: Checkpoint, original: HFFolder | None, architecture: Architecture, dtype: str | None
) -> dict[str, Any]:
    """What is known of the weights' source; of a training run also what it was."""
    own = checkpoint.manifest
    source = own.get("source") or (original.manifest_entry() if original else {})
    common, exceptions = hf_dtypes(checkpoint, original)
    if dtype is not None:
        common, exceptions = dtype_name(NAMES[dtype]), {}
    result = {
        "source": {**source, "config": converted_config(source["config"], architecture, dtype)},
        "hf_dtype": common,
        "hf_dtype_exceptions": exceptions,
    }
    trained = own.get("training") or own.get("trained")
    if trained:
        result["trained"] = trained
    if "tensor_crc32" in own and dtype is None:
        result["tensor_crc32"] = own["tensor_crc32"]
    return result


def _copy(checkpoint: Checkpoint, arguments: argparse.Namespace, output: Path) -> None:
    """The checkpoint as it is: torch_dist loads in any layout, optimizer state included."""
    if checkpoint.format != checkpoint_folder.TORCH_DIST or arguments.ckpt_format != checkpoint_folder.TORCH_DIST:
        raise UserError(
            f"{checkpoint.path} is {checkpoint.format}, asked for is {arguments.ckpt_format}: the optimizer's state is kept "
            "from torch_dist to torch_dist only; leave it out, or keep the format"
        )
    if arguments.dtype:
        raise UserError(f"DTYPE={arguments.dtype} cannot be applied to optimizer state: leave out one of the two")
    size = sum(path.stat().st_size for path in checkpoint.path.rglob("*") if path.is_file())
    check_free_space(output, size, f"a copy of {checkpoint.path}")
    shutil.copytree(checkpoint.path, checkpoint_folder.iteration_path(output, checkpoint.iteration))
    write_text(output / checkpoint_folder.TRACKER, str(checkpoint.iteration))
    print("copied with its optimizer state: torch_dist is read in any layout")
