"""Reading a checkpoint's tensors, whatever layout they were written in, without running anything that is in it."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from megatron.sft.checkpoint import torch_file
from megatron.sft.checkpoint.folder import TORCH_DIST, Checkpoint
from megatron.sft.checkpoint.metadata_file import read_metadata
from megatron.sft.checkpoint.shard_slice import ShardSlice
from megatron.sft.checkpoint.torch_format import EMBEDDING, OUTPUT, TorchFormatParameters
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.weight_names import WeightEntry, weight_entries
from megatron.sft.hf.parameters import HFParameters
from megatron.sft.runtime.errors import UserError


class SliceReader:
    """The tensors of a torch_dist checkpoint's folder. `key in reader` says whether it holds a tensor of that name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = read_metadata(folder)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: stored
            for key, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        self._pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def require(self, keys: Iterable[str]) -> None:
        """A `UserError` where the checkpoint lacks one of these tensors."""
        missing = sorted(set(keys) - self.tensors.keys())
        if missing:
            raise UserError(f"{self.folder} lacks {len(missing)} tensors, {missing[0]} among them: convert the model again")

    def fill(self, slices: list[ShardSlice]) -> None:
        """Set the values of every slice. A tensor that is missing, incomplete or of another shape is a `UserError`."""
        self.require(wanted.key for wanted in slices)
        list(self._pool.map(self._fill, slices))

    @torch.no_grad()
    def _fill(self, wanted: ShardSlice) -> None:
        stored = self.tensors[wanted.key]
        compared = slice(1, None) if wanted.padded else slice(None)
        if len(stored.size) != len(wanted.whole) or tuple(stored.size)[compared] != wanted.whole[compared]:
            raise UserError(
                f"{self.folder} holds {wanted.key} as {tuple(stored.size)}, the model has {wanted.whole}: "
                "take a checkpoint of this model"
            )
        target = wanted.values().view(wanted.sizes)
        if wanted.padded:
            target.zero_()
        self._copy(wanted, self._parts(wanted), target)

    def read(self, wanted: ShardSlice) -> Tensor:
        """The values in the shape `sizes`: mapped from the file where one stored chunk holds all of them, else a copy."""
        parts = list(self._parts(wanted))
        if len(parts) == 1 and tuple(parts[0][1].shape) == wanted.sizes:
            return parts[0][1]
        result = torch.empty(wanted.sizes, dtype=wanted.dtype)
        self._copy(wanted, parts, result)
        return result

    def _parts(self, wanted: ShardSlice) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """For every stored chunk that overlaps the slice: where the overlap lies in the slice, and its values in the file."""
        for chunk in self.tensors[wanted.key].chunks:
            low = [max(a, b) for a, b in zip(wanted.offsets, chunk.offsets, strict=True)]
            ends = zip(wanted.offsets, wanted.sizes, chunk.offsets, chunk.sizes, strict=True)
            high = [min(start + size, other + length) for start, size, other, length in ends]
            if all(a < b for a, b in zip(low, high, strict=True)):
                stored = read_chunk(self.folder, self._metadata, wanted.key, chunk)
                yield _within(low, high, wanted.offsets), stored[_within(low, high, chunk.offsets)]

    def _copy(self, wanted: ShardSlice, parts: Iterable[tuple[tuple[slice, ...], Tensor]], target: Tensor) -> None:
        """Copy the parts of a slice to `target`, of shape `sizes`; a `UserError` if they are not all of it."""
        copied = 0
        for place, part in parts:
            target[place].copy_(part)
            copied += part.numel()
        expected = prod(wanted.sizes)
        if wanted.padded:  # it may reach beyond the stored tensor
            ends = zip(wanted.offsets, wanted.sizes, self.tensors[wanted.key].size, strict=True)
            expected = prod(max(0, min(start + size, whole) - start) for start, size, whole in ends)
        if copied != expected:
            raise UserError(f"{self.folder} holds {wanted.key} only in part: take another checkpoint")


def _within(low: list[int], high: list[int], offsets: Iterable[int]) -> tuple[slice, ...]:
    return tuple(slice(a - start, b - start) for a, b, start in zip(low, high, offsets, strict=True))


def read_chunk(folder: Path, metadata: Metadata, key: str, chunk: ChunkStorageMetadata) -> Tensor:
    """A stored chunk of the tensor `key`, mapped from its file. One that is not as .metadata says is a `UserError`."""
    place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
    path = folder / place.relative_path
    tensor = torch_file.read_tensor(path, place.offset, place.length)
    stored: TensorStorageMetadata = metadata.state_dict_metadata[key]  # type: ignore[assignment]
    if tensor.shape != chunk.sizes or tensor.dtype != stored.properties.dtype:
        raise UserError(f"{path} does not hold what .metadata says of {key}: take another checkpoint")
    return tensor


class TorchDistParameters:
    """Whole Megatron parameters of a torch_dist checkpoint, without the vocabulary's padding."""

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self.architecture = architecture
        self._reader = SliceReader(folder)
        self._reader.require(entry.stored_key for entry in weight_entries(architecture))

    def meta(self, entry: WeightEntry) -> Tensor:
        stored = self._reader.tensors[entry.stored_key]
        size = list(stored.size[len(entry.place) :])
        if entry.megatron in (EMBEDDING, OUTPUT):
            size[0] = min(size[0], self.architecture.vocab_size)
        return torch.empty(size, dtype=stored.properties.dtype, device="meta")

    def read(self, entry: WeightEntry) -> Tensor:
        meta = self.meta(entry)
        offsets, sizes = (*entry.place, *(0,) * meta.dim()), (*(1,) * len(entry.place), *meta.shape)
        whole = tuple(self._reader.tensors[entry.stored_key].size)
        wanted = ShardSlice(entry.stored_key, offsets, sizes, whole, meta.dtype, lambda: meta)
        return self._reader.read(wanted).reshape(meta.shape)


StoredParameters = TorchDistParameters | TorchFormatParameters


def stored_parameters(
    checkpoint: Checkpoint, architecture: Architecture, source: HFParameters | None = None
) -> StoredParameters:
    """The checkpoint's whole parameters. `source`: the original model, for rows of the vocabulary that a checkpoint lacks."""
    if checkpoint.format == TORCH_DIST:
        return TorchDistParameters(checkpoint.path, architecture)
    return TorchFormatParameters(checkpoint.path, architecture, source)
