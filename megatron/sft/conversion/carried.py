"""Tensors that are not trained but belong to the model: a vision tower, a projector, a head that predicts further tokens.

A conversion keeps them in a file with the checkpoint, and an export writes them as they were.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.sft.checkpoint.folder import Checkpoint, iteration_path
from megatron.sft.hf.folder import HFFolder
from megatron.sft.hf.safetensors_file import SafetensorsFile, tensor_bytes, write_file
from megatron.sft.runtime.errors import UserError

FILE = "carried.safetensors"


def write_carried(source: HFFolder, folder: Path) -> dict[str, Any]:
    """Write the carried tensors of a Hugging Face folder into a checkpoint's; returns what its manifest says of them, or {}."""
    if not source.carried:
        return {}
    checksums: dict[str, int] = {}
    plan = {name: torch.empty(source.dtype_and_shape(name)[1], dtype=source.dtype_and_shape(name)[0], device="meta")
            for name in source.carried}  # fmt: skip

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in plan:
            tensor = source.tensor(name)
            checksums[name] = zlib.crc32(tensor_bytes(tensor))
            yield name, tensor

    write_file(folder / FILE, plan, tensors())
    print(f"{len(plan):,} tensors of {describe(source.carried)} are kept for the export, not trained")
    return {"carried": checksums}


def describe(names: list[str]) -> str:
    """The modules that carried tensors are of: `mtp, model.visual`, or `model.layers.61`."""
    parts = [name.rpartition(".")[0].split(".") for name in names]
    depths = (1 if part[0] != "model" else 3 if part[1] == "layers" else 2 for part in parts)
    return ", ".join(sorted({".".join(part[:depth]) for part, depth in zip(parts, depths, strict=True)}))


class CarriedTensors:
    """The carried tensors of a checkpoint's model: from its own file, that of its conversion, or the original model.

    `names`: in the order of the conversion; empty for most models. One that has changed is a `UserError`.
    """

    def __init__(self, checkpoint: Checkpoint, hf_dir: Path) -> None:
        source = checkpoint.manifest.get("source", {})
        self._checksums: dict[str, int] = source.get("carried", {})
        self.names = list(self._checksums)
        self._source: SafetensorsFile | HFFolder | None = None
        self._where = ""
        if self.names:
            self._source, self._where = _find(checkpoint, hf_dir, self.names)

    def plan(self) -> dict[str, Tensor]:
        """Name -> dtype and shape."""
        return {name: torch.empty_like(self._tensor(name), device="meta") for name in self.names}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names:
            tensor = self._tensor(name)
            if zlib.crc32(tensor_bytes(tensor)) != self._checksums[name]:
                raise UserError(
                    f"{self._where}: {name} is not what was converted (its checksum differs): convert the model again"
                )
            yield name, tensor

    def _tensor(self, name: str) -> Tensor:
        assert self._source is not None
        return self._source.tensor(name)


def _find(checkpoint: Checkpoint, hf_dir: Path, names: list[str]) -> tuple[SafetensorsFile | HFFolder, str]:
    load = checkpoint.manifest.get("training", checkpoint.manifest.get("trained", {})).get("options", {}).get("load")
    starts = [Path(load), iteration_path(Path(load), 1)] if load else []
    for path in (checkpoint.path / FILE, *(start / FILE for start in starts)):
        if path.is_file():
            file = SafetensorsFile(path)
            if set(names) <= file.entries.keys():
                return file, str(path)
    folder = HFFolder(hf_dir)
    if set(names) <= set(folder.carried):
        return folder, str(hf_dir)
    raise UserError(
        f"{checkpoint.path} is of a model with {len(names)} tensors that are not trained ({describe(names)}), which are "
        f"neither in {checkpoint.path / FILE} nor in {hf_dir}: give the folder that was converted"
    )
