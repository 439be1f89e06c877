"""The tensors of a `torch_dist` checkpoint, read one parameter at a time whatever layout they were written in."""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron.sft.checkpoint import torch_file
from megatron.sft.checkpoint.folder import TORCH_DIST, Checkpoint
from megatron.sft.checkpoint.metadata_file import read_metadata
from megatron.sft.checkpoint.torch_format import TorchFormatParameters
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.weight_names import WeightEntry, weight_entries
from megatron.sft.hf.parameters import HFParameters
from megatron.sft.runtime.errors import UserError

_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


class TorchDistParameters:
    """Whole Megatron parameters of a torch_dist checkpoint; rows of padding of the vocabulary are left out."""

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self.folder = folder
        self.architecture = architecture
        metadata = read_metadata(folder)
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: facts
            for key, facts in metadata.state_dict_metadata.items()
            if isinstance(facts, TensorStorageMetadata)
        }
        self._metadata = metadata
        lacking = sorted({entry.stored_key for entry in weight_entries(architecture)} - self._tensors.keys())
        if lacking:
            raise UserError(
                f"{folder} lacks {len(lacking)} of the model's parameters, {lacking[0]} among them: convert the model again"
            )

    def meta(self, entry: WeightEntry) -> Tensor:
        stored = self._tensors[entry.stored_key]
        size = list(stored.size[len(entry.place) :])
        if entry.megatron in _VOCABULARY:
            size[0] = min(size[0], self.architecture.vocab_size)
        return torch.empty(size, dtype=stored.properties.dtype, device="meta")

    def read(self, entry: WeightEntry) -> Tensor:
        """Assembled of the stored chunks that overlap the parameter; the chunk itself where there is only one."""
        wanted = self.meta(entry)
        result: Tensor | None = None
        lead = len(entry.place)
        filled = 0
        for chunk in self._tensors[entry.stored_key].chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            inside = zip(entry.place, offsets[:lead], sizes[:lead], strict=True)
            if not all(start <= index < start + size for index, start, size in inside):
                continue
            places, cuts = _overlap(offsets[lead:], sizes[lead:], tuple(wanted.shape))
            if any(place.start >= place.stop for place in places):
                continue
            part = read_chunk(self.folder, self._metadata, MetadataIndex(entry.stored_key, chunk.offsets))
            first = tuple(index - start for index, start in zip(entry.place, offsets, strict=False))
            part = part[first][cuts]
            if part.shape == wanted.shape:
                return part
            result = torch.empty(wanted.shape, dtype=wanted.dtype) if result is None else result
            result[places] = part
            filled += part.numel()
        if result is None or filled != wanted.numel():
            raise UserError(f"{self.folder} holds {entry.megatron} only in part: take another checkpoint")
        return result


def read_chunk(folder: Path, metadata: Metadata, index: MetadataIndex) -> Tensor:
    """One stored part of a tensor, mapped from the file. One that is not as .metadata says is a `UserError`."""
    info = metadata.storage_data[index]
    stored: TensorStorageMetadata = metadata.state_dict_metadata[index.fqn]  # type: ignore[assignment]
    path = folder / info.relative_path
    tensor = torch_file.read_tensor(path, info.offset, info.length)
    (size,) = {chunk.sizes for chunk in stored.chunks if chunk.offsets == index.offset}
    if tensor.shape != size or tensor.dtype != stored.properties.dtype:
        raise UserError(f"{path} holds something else than .metadata says of {index.fqn}: take another checkpoint")
    return tensor


def _overlap(
    offsets: tuple[int, ...], sizes: tuple[int, ...], whole: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a chunk lies in the whole tensor, and which part of the chunk that is (the rest is padding)."""
    ends = [min(start + size, limit) for start, size, limit in zip(offsets, sizes, whole, strict=True)]
    places = tuple(slice(start, end) for start, end in zip(offsets, ends, strict=True))
    cuts = tuple(slice(0, max(0, end - start)) for start, end in zip(offsets, ends, strict=True))
    return places, cuts


StoredParameters = TorchDistParameters | TorchFormatParameters


def stored_parameters(
    checkpoint: Checkpoint, architecture: Architecture, source: HFParameters | None = None
) -> StoredParameters:
    """The checkpoint's whole parameters. `source` is the original model, where the checkpoint may have fewer rows than it."""
    if checkpoint.format == TORCH_DIST:
        return TorchDistParameters(checkpoint.path, architecture)
    return TorchFormatParameters(checkpoint.path, architecture, source)
