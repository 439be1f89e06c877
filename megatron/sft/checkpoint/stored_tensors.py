"""The tensors of a `torch_dist` checkpoint, read one parameter at a time whatever layout they were written in."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron.sft.errors import UserError, first_line
from megatron.sft.families.rules import Shape
from megatron.sft.weights import BoundRule, bound_rules

_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")

# The only names that the pickled .metadata of a checkpoint may call for.
_METADATA_GLOBALS: dict[str, set[str] | None] = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "StorageMeta"},
    "torch.distributed.checkpoint.planner": {"WriteItem", "WriteItemType", "SavePlan", "TensorWriteData"},
    "torch": {"Size", "device", "strided", "bfloat16", "bool", "uint8", "float8_e4m3fn", "float8_e5m2"}
    | {f"{kind}{bits}" for kind in ("float", "int") for bits in (8, 16, 32, 64)},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset", "dict", "list", "tuple", "slice", "bytearray"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "_codecs": {"encode"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        names = _METADATA_GLOBALS.get(module, set())
        # A dotted name would reach what a module has imported.
        if "." not in name and (names is None or name in names):
            found = super().find_class(module, name)
            if names is not None or getattr(found, "__module__", None) == module:
                return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_metadata(folder: Path) -> Metadata:
    """The checkpoint's .metadata, which is a pickle, read with a short list of names that it may ask for."""
    path = folder / ".metadata"
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it holds something else")
        return metadata
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the checkpoint is not whole, take another one") from None
    except Exception as error:
        raise UserError(
            f"{path} is damaged or not to be trusted ({first_line(error)}): take another checkpoint"
        ) from None


class TorchDistParameters:
    """Whole Megatron parameters of a torch_dist checkpoint; rows of padding of the vocabulary are left out."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.folder = folder
        self.shape = shape
        metadata = read_metadata(folder)
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: facts
            for key, facts in metadata.state_dict_metadata.items()
            if isinstance(facts, TensorStorageMetadata)
        }
        self._storage: dict[MetadataIndex, Any] = metadata.storage_data or {}
        lacking = sorted({bound.stored_key for bound in bound_rules(shape)} - self._tensors.keys())
        if lacking:
            raise UserError(
                f"{folder} lacks {len(lacking)} of the model's parameters, {lacking[0]} among them: convert the model again"
            )

    def meta(self, bound: BoundRule) -> Tensor:
        stored = self._tensors[bound.stored_key]
        size = list(stored.size[len(bound.place) :])
        if bound.megatron in _VOCABULARY:
            size[0] = min(size[0], self.shape.vocab_size)
        return torch.empty(size, dtype=stored.properties.dtype, device="meta")

    def read(self, bound: BoundRule) -> Tensor:
        """Assembled of the stored chunks that overlap the parameter; the chunk itself where there is only one."""
        wanted = self.meta(bound)
        result: Tensor | None = None
        lead = len(bound.place)
        filled = 0
        for chunk in self._tensors[bound.stored_key].chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            inside = zip(bound.place, offsets[:lead], sizes[:lead], strict=True)
            if not all(start <= index < start + size for index, start, size in inside):
                continue
            places, cuts = _overlap(offsets[lead:], sizes[lead:], tuple(wanted.shape))
            if any(place.start >= place.stop for place in places):
                continue
            part = self._chunk(bound.stored_key, chunk.offsets, sizes, wanted.dtype)
            first = tuple(index - start for index, start in zip(bound.place, offsets, strict=False))
            part = part[first][cuts]
            if part.shape == wanted.shape:
                return part
            result = torch.empty(wanted.shape, dtype=wanted.dtype) if result is None else result
            result[places] = part
            filled += part.numel()
        if result is None or filled != wanted.numel():
            raise UserError(f"{self.folder} holds {bound.megatron} only in part: take another checkpoint")
        return result

    def _chunk(self, key: str, offsets: torch.Size, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        info = self._storage.get(MetadataIndex(key, offsets))
        if info is None or Path(info.relative_path).name != info.relative_path or info.transform_descriptors:
            raise UserError(f"{self.folder / '.metadata'} does not say where {key} lies: take another checkpoint")
        path = self.folder / info.relative_path
        try:
            with open(path, "rb") as file:
                view: Any = _create_file_view(file, info.offset, info.length)
                tensor = torch.load(view, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"{path} is damaged ({first_line(error)}): take another checkpoint") from None
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != sizes or tensor.dtype != dtype:
            raise UserError(f"{path} holds something else than .metadata says of {key}: take another checkpoint")
        return tensor


def _overlap(
    offsets: tuple[int, ...], sizes: tuple[int, ...], whole: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a chunk lies in the whole tensor, and which part of the chunk that is (the rest is padding)."""
    ends = [min(start + size, limit) for start, size, limit in zip(offsets, sizes, whole, strict=True)]
    places = tuple(slice(start, end) for start, end in zip(offsets, ends, strict=True))
    cuts = tuple(slice(0, max(0, end - start)) for start, end in zip(offsets, ends, strict=True))
    return places, cuts
