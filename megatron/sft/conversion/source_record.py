"""What a checkpoint's manifest says of the Hugging Face model that it comes from: conversion writes it, export reads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.sft.checkpoint.folder import MANIFEST, Checkpoint
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.config_fields import text_fields
from megatron.sft.families.long_context import RopeExtension
from megatron.sft.families.parameters import DTYPE_OPTIONS
from megatron.sft.families.registry import read_architecture
from megatron.sft.families.weight_names import check_hf_names
from megatron.sft.hf.folder import HFFolder, dtype_name
from megatron.sft.runtime.errors import UserError

_DTYPE_FIELDS = ("dtype", "torch_dtype")


def source_model(checkpoint: Checkpoint, hf_dir: Path | None) -> tuple[Architecture, HFFolder | None]:
    """The checkpoint's architecture, from its manifest.

    For a checkpoint of another program, which has none, both the architecture and the folder come from `hf_dir`, the original
    model; then its weights give the dtypes too, and rows of the vocabulary that the checkpoint lacks.
    """
    config = checkpoint.manifest.get("source", {}).get("config")
    if config is not None:
        return read_architecture(config, str(checkpoint.path / MANIFEST)), None
    if hf_dir is None:
        raise UserError(
            f"{checkpoint.path} has no manifest.json with the model's configuration: give the folder of the original model "
            "(HF_DIR for scripts/2_convert.sh)"
        )
    original = HFFolder(hf_dir)
    check_hf_names(original.architecture, original.tensor_names, str(original.path))
    return original.architecture, original


def converted_config(config: dict[str, Any], architecture: Architecture, dtype: str | None) -> dict[str, Any]:
    """config.json as it describes the converted model: with the vocabulary rows that were added, and in the given dtype."""
    return edited_config(config, architecture, dtype_name(DTYPE_OPTIONS[dtype]) if dtype else None)


def edited_config(config: dict[str, Any], architecture: Architecture, dtype: str | None) -> dict[str, Any]:
    """config.json with the architecture's vocabulary and in that dtype, in text_config where there is one; None: as it is."""
    text, result = dict(text_fields(config)), dict(config)
    if architecture.vocab_size != read_architecture(config, "config.json").vocab_size:
        text["vocab_size"] = architecture.vocab_size
    if text_fields(config) is config:
        result = text
    else:
        result["text_config"] = text
        if dtype and (stated := [field for field in _DTYPE_FIELDS if field in text]):
            text |= dict.fromkeys(stated, dtype)
    if dtype:
        result |= dict.fromkeys(dtype_fields(result), dtype)
    return result


def rope_extension(manifest: Mapping[str, Any]) -> RopeExtension | None:
    """How the conversion extended the original model's positions."""
    record = manifest.get("source", {}).get("rope_extension")
    return RopeExtension(**record) if record else None


def dtype_fields(config: Mapping[str, Any]) -> list[str]:
    """The fields of a config.json with the weights' dtype: of transformers 5, of older versions, or both."""
    return [field for field in _DTYPE_FIELDS if field in config] or ["dtype"]


def dtype_record(dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """The dtype that most Hugging Face tensors have, and the tensors that have another. `dtypes`: name -> dtype."""
    names = {name: dtype_name(dtype) for name, dtype in dtypes.items()}
    common = max(sorted(set(names.values())), key=list(names.values()).count)
    return {"hf_dtype": common, "hf_dtype_exceptions": {name: dtype for name, dtype in names.items() if dtype != common}}


def read_dtype_record(checkpoint: Checkpoint, original: HFFolder | None) -> dict[str, Any]:
    """The manifest's `dtype_record`, or that of the original model where the checkpoint has no manifest."""
    if "hf_dtype" in checkpoint.manifest:
        return {name: checkpoint.manifest[name] for name in ("hf_dtype", "hf_dtype_exceptions")}
    assert original is not None
    return dtype_record({name: original.dtype_and_shape(name)[0] for name in original.tensor_names})
