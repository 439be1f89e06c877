"""Hugging Face model folders: config.json, and safetensors read tensor by tensor and written in shards with an index."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron.sft.errors import UserError
from megatron.sft.families import read_shape
from megatron.sft.families.rules import Shape
from megatron.sft.manifest import read_json, sha256_of_file, write_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000


class HFFolder:
    """A Hugging Face model on disk, opened for reading."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UserError(f"model folder {path} does not exist: run scripts/1_download.sh model ID, or mend the path")
        self.path = path
        self.config: dict[str, Any] = read_json(
            path / "config.json", "model configuration", "give a Hugging Face model folder (scripts/1_download.sh)"
        )
        self.shape: Shape = read_shape(self.config, str(path / "config.json"))
        self._files = self._find_files()

    def _find_files(self) -> dict[str, Path]:
        """Tensor name to file."""
        if (self.path / INDEX).exists():
            index = read_json(self.path / INDEX, "weight index", "download the model again")
            weight_map = index.get("weight_map", {})
            for file in set(weight_map.values()):
                if Path(file).name != file:
                    raise UserError(f"{self.path / INDEX} names {file!r}, which lies outside the folder: do not use it")
                if not (self.path / file).exists():
                    raise UserError(f"{self.path / file} is missing: download the model again")
            return {name: self.path / file for name, file in weight_map.items()}
        single = self.path / SINGLE
        if not single.exists():
            raise UserError(
                f"{self.path} has no {SINGLE} and no {INDEX}: only safetensors weights are read, "
                "download a revision that has them"
            )
        with self._open(single) as file:
            return dict.fromkeys(file.keys(), single)

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}): download the model again") from None

    @property
    def tensor_names(self) -> set[str]:
        return set(self._files)

    @property
    def weight_files(self) -> list[Path]:
        return sorted(set(self._files.values()))

    def tensor(self, name: str) -> Tensor:
        """One tensor in its dtype on disk."""
        with self._open(self._files[name]) as file:
            try:
                tensor: Tensor = file.get_tensor(name)
            except SafetensorError as error:
                raise UserError(f"{self._files[name]}: tensor {name} cannot be read ({error})") from None
        return tensor

    def describe(self) -> dict[str, Any]:
        """What a manifest says of the source: the configuration, and a checksum of each weight file."""
        files = {path.name: sha256_of_file(path) for path in self.weight_files}
        return {"path": str(self.path), "config": self.config, "weights_sha256": files}


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write tensors, in the order given, as safetensors shards of at most `max_shard_bytes`, with an index if several."""
    shards: list[dict[str, int]] = []  # name -> bytes, a dict a shard
    current: dict[str, Tensor] = {}

    def part(number: int) -> Path:
        return folder / f"part-{number:05d}.safetensors"

    def flush() -> None:
        shards.append({name: tensor.nbytes for name, tensor in current.items()})
        save_file(current, part(len(shards)), metadata={"format": "pt"})
        current.clear()

    for name, tensor in tensors:
        if current and sum(t.nbytes for t in current.values()) + tensor.nbytes > max_shard_bytes:
            flush()
        current[name] = tensor.contiguous()
    flush()
    if len(shards) == 1:
        part(1).rename(folder / SINGLE)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        part(number).rename(folder / name)
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(size for shard in shards for size in shard.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy everything of a model folder but its weights: configuration, tokenizer, templates, licence. Returns the names."""
    weights = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".index.json")
    names = sorted(p.name for p in source.iterdir() if p.is_file() and not p.name.endswith(weights))
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def shape_record(shape: Shape) -> dict[str, Any]:
    """A `Shape` as JSON values."""
    record: dict[str, Any] = json.loads(json.dumps(shape.__dict__, default=lambda value: dtype_name(value)))
    return record
