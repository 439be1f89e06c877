"""Hugging Face model folders: config.json, and safetensors read tensor by tensor and written in shards with an index."""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.config_fields import text_fields
from megatron.sft.families.fused_experts import FusedExperts, fused_block, fused_experts
from megatron.sft.families.long_context import RopeExtension, extended_config
from megatron.sft.families.registry import carried_names, config_notes, read_architecture, text_prefixes
from megatron.sft.hf.block_scales import block_size, dequantised, scales_of, unquantised_config
from megatron.sft.hf.mxfp4 import BLOCKS, SCALES, packed_experts
from megatron.sft.hf.safetensors_file import SafetensorsFile, write_file
from megatron.sft.hf.tokenizer_files import chat_template_sha256, num_tokens, tokenizer_sha256
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import read_json, write_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000


class HFFolder:
    """A Hugging Face model on disk, opened for reading; a damaged or incomplete one is a `UserError`.

    `architecture` has a vocabulary row for every token of the tokenizer; `rows_on_disk` are the embedding's. Tensors have the
    names of the family's table here: experts that lie fused in one tensor, whose module is `fused_block` then, and the text
    model of a folder with other parts, whose `prefixes` differ. `carried`: names of the other parts' tensors. Weights in 8 bits
    with scales are what they stand for. `config` has no quantization entry. `notes`: for the user.
    """

    def __init__(self, path: Path, extension: RopeExtension | None = None) -> None:
        """extension: of the positions, which `config` then has."""
        if path.is_file():
            raise UserError(f"model folder {path} is a file: give the folder that it is in")
        if not path.is_dir():
            raise UserError(f"model folder {path} does not exist: run scripts/1_download.sh model ID, or correct the path")
        self.path = path
        if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
            raise UserError(
                f"{path} is a PEFT adapter, not a model: give the model that it belongs to; LORA_INIT_FROM={path} continues it"
            )
        self.config: dict[str, Any] = read_json(
            path / "config.json", "model configuration", "give a Hugging Face model folder (scripts/1_download.sh)"
        )
        if not isinstance(self.config, dict):
            raise UserError(f"{path / 'config.json'} is not a model configuration: take the model's own file")
        if (path / "generation_config.json").exists():  # an export edits it, and transformers passes over a damaged one
            read_json(path / "generation_config.json", "generation configuration", "take the model's own file")
        self.extension = extension
        self._blocks = block_size(self.config)
        stated = self.config
        self.config = unquantised_config(extended_config(self.config, extension, str(path / "config.json")), str(path))
        self.dequantised = "quantization_config" in {**text_fields(stated), **stated} and self.config != stated
        on_disk = read_architecture(self.config, str(path / "config.json"))
        self.rows_on_disk = on_disk.vocab_size
        self.architecture: Architecture = replace(on_disk, vocab_size=max(on_disk.vocab_size, num_tokens(path)))
        self.notes: list[str] = config_notes(self.config)
        self._files = self._find_files()
        self._scales, only_scales = scales_of({name: file.entries[name] for name, file in self._files.items()}, str(path))
        if self._scales and not self.dequantised:
            raise UserError(f"{path}: weights are in 8 bits, config.json does not say so: take the model's own file")
        self._scale_files = {name: self._files.pop(name) for name in only_scales}
        self._parts: dict[str, tuple[str, int, int, int]] = {}  # name -> fused tensor, expert, part of how many
        self._renamed: dict[str, str] = {}
        self.carried = sorted(carried_names(self.config, self._files))
        self._carried_files = {name: self._files.pop(name) for name in self.carried}
        self.prefixes = text_prefixes(self.config, self._files)
        for name in list(self._files):
            for prefix, there in self.prefixes.items():
                if name.startswith(there):
                    self._renamed[prefix + name.removeprefix(there)] = name
                    self._files[prefix + name.removeprefix(there)] = self._files.pop(name)
                    break
        self._packed = packed_experts(self._files, str(path))
        if self._packed and not self.dequantised:
            raise UserError(f"{path}: weights are in MXFP4, config.json does not say so: take the model's own file")
        for name in self._packed:
            self._files[name] = self._files.pop(f"{name}{BLOCKS}")
            self._scale_files[f"{name}{SCALES}"] = self._files.pop(f"{name}{SCALES}")
        if self._packed:
            self.notes.append(
                f"{len(self._packed):,} tensors of experts are in MXFP4: they are read as the bfloat16 they stand for"
            )
        if self._scales:
            self.notes.append(f"{len(self._scales):,} weights are in 8 bits: they are read as bfloat16, times their scales")
        self.fused_block = fused_block(self._files) if self.architecture.moe else None
        if self.fused_block:
            self._split_fused(fused_experts(self.architecture, self.fused_block))

    def _find_files(self) -> dict[str, SafetensorsFile]:
        """Tensor name -> file."""
        single, index = self.path / SINGLE, self.path / INDEX
        if single.exists():  # as in transformers, whatever an index says
            if index.exists():
                self.notes.append(f"{SINGLE} is read, as transformers does; {INDEX} next to it is ignored")
            file = SafetensorsFile(single)
            return dict.fromkeys(file.entries, file)
        if not index.exists():
            other = next(iter(sorted([*self.path.glob("pytorch_model*.bin"), *self.path.glob("*.pth")])), None)
            there = f"; {other.name} is a pickle file, which could run code" if other else ""
            raise UserError(
                f"{self.path} has no {SINGLE} and no {INDEX}: only safetensors weights are read{there}: download a revision "
                "that has them, or if you trust the folder load it with transformers and save it with save_pretrained"
            )
        return self._indexed_files()

    def _split_fused(self, form: FusedExperts) -> None:
        """Give the experts of fused tensors, and what else has another name next to them, the names of the family's table."""
        for fused, experts in form.tensors.items():
            if fused not in self._files:
                continue  # its parts are reported as missing
            file, num_parts = self._files.pop(fused), len(experts[0])
            packed = self._packed.get(fused)
            shape = (packed.num_experts, *packed.shape) if packed else file.entries[fused][1]
            if len(shape) < 2 or shape[0] != len(experts) or shape[1] % num_parts:
                raise UserError(
                    f"{self.path}: {fused} is {tuple(shape)}, config.json says {len(experts)} experts: weights and "
                    "configuration do not belong together"
                )
            for expert, names in enumerate(experts):
                for part, name in enumerate(names):
                    self._parts[name] = (fused, expert, part, num_parts)
                    self._files[name] = file
        for name, on_disk in form.renamed.items():
            if on_disk in self._files and name != on_disk:
                self._renamed[name] = on_disk
                self._files[name] = self._files.pop(on_disk)

    def _indexed_files(self) -> dict[str, SafetensorsFile]:
        path = self.path / INDEX
        index = read_json(path, "weight index", "download the model again")
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{path} has no weight_map of tensors to files: download the model again")
        files = {}
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file:
                raise UserError(f"{path} names {file!r}, which lies outside the folder: do not use it")
            if not (self.path / file).exists():
                raise UserError(f"{self.path / file} is missing: download the model again")
            files[file] = SafetensorsFile(self.path / file)
        for file, opened in files.items():
            indexed = {name for name, place in weight_map.items() if place == file}
            for name in sorted(indexed ^ opened.entries.keys()):
                where = "not in the file" if name in indexed else "in the file but not in the index"
                raise UserError(f"{path} and {file} disagree: {name} is {where}: download the model again")
        return {name: files[file] for name, file in weight_map.items()}

    @property
    def tensor_names(self) -> set[str]:
        return set(self._files)

    @property
    def weight_files(self) -> list[Path]:
        return sorted({file.path for file in (*self._files.values(), *self._carried_files.values())})

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(path.stat().st_size for path in self.weight_files)

    def dtype_and_shape(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        if name not in self._parts:
            file = self._carried_files.get(name) or self._files[name]
            on_disk = self._renamed.get(name, name)
            dtype, shape = file.entries[on_disk]
            return (torch.bfloat16 if on_disk in self._scales else dtype), shape
        fused, _, _, num_parts = self._parts[name]
        if fused in self._packed:
            return torch.bfloat16, self._packed[fused].shape
        dtype, (_, rows, *rest) = self._files[name].entries[fused]
        return dtype, (rows // num_parts, *rest)

    def tensor(self, name: str) -> Tensor:
        """One tensor, also a carried one, mapped from the file unless it is in 8 bits there."""
        if name not in self._parts:
            file = self._carried_files.get(name) or self._files[name]
            on_disk = self._renamed.get(name, name)
            stored = file.tensor(on_disk)
            if on_disk not in self._scales:
                return stored
            return dequantised(stored, self._scale(self._scales[on_disk]), self._blocks)
        fused, expert, part, num_parts = self._parts[name]
        if fused in self._packed:
            return self._packed[fused].expert(expert)
        return self._files[name].tensor(fused)[expert].chunk(num_parts)[part]

    def _scale(self, name: str) -> Tensor:
        return self._scale_files[name].tensor(name)

    def manifest_entry(self) -> dict[str, Any]:
        """What a manifest says of the source: the configuration, and checksums of tokenizer and chat template."""
        return {
            "path": os.path.abspath(self.path),  # commands that name it may run in another folder
            "config": self.config,
            "tokenizer_sha256": tokenizer_sha256(self.path),
            "chat_template_sha256": chat_template_sha256(self.path),
            **({"fused_experts": self.fused_block} if self.fused_block else {}),
            **({"rope_extension": asdict(self.extension)} if self.extension else {}),
            **({"prefixes": self.prefixes} if self.prefixes else {}),
            **({"dequantised": True} if self.dequantised else {}),
        }


def write_weights(
    folder: Path, plan: dict[str, Tensor], tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `tensors` as they come, in safetensors files of at most `max_shard_bytes`, with an index if there are several.

    `plan`: name to dtype and shape (a meta tensor), in the order of `tensors`. One tensor is in memory at a time.
    """
    shards: list[dict[str, Tensor]] = [{}]
    free = max_shard_bytes
    for name, tensor in plan.items():
        if shards[-1] and tensor.nbytes > free:
            shards.append({})
            free = max_shard_bytes
        shards[-1][name] = tensor
        free -= tensor.nbytes
    if len(shards) == 1:
        write_file(folder / SINGLE, plan, tensors)
        return
    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard, tensors)
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(tensor.nbytes for tensor in plan.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy all files of a model folder but weights, kept originals (*.orig) and the download's record; returns their names."""
    skipped = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".index.json", ".orig")
    files = (path for path in source.iterdir() if path.is_file() and not path.name.startswith(".download."))
    names = sorted(path.name for path in files if not path.name.endswith(skipped))
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def architecture_record(architecture: Architecture) -> dict[str, Any]:
    """An `Architecture` as JSON values, under the names that manifests have had since format 1."""
    record: dict[str, Any] = json.loads(json.dumps(asdict(architecture), default=lambda value: dtype_name(value)))
    record["mixture"] = record.pop("moe")
    # Layers in groups of equal ones that follow one another: how many, and what they are.
    groups = itertools.groupby(record.pop("layers"))
    record["layers"] = [[len(list(equal)), layer] for layer, equal in groups]
    return record
