"""The `.metadata` file of a torch_dist checkpoint, which is a pickle: read without trusting it, checked, and rebuilt.

Only names, sizes and places are taken from the file; nothing in it decides what is called.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron.sft.checkpoint.pickled import Record, read_records, refusing_damage

FILE = ".metadata"
_TORCH = "torch.distributed.checkpoint."
_OTHER_NAMES = {
    "torch.serialization._get_layout",
    "torch.device",
    "torch.strided",
    "builtins.slice",
    "builtins.getattr",  # how an enum's member is named by some versions of Python; not called here
    "_codecs.encode",
    *(f"pathlib.{kind}" for kind in ("Path", "PosixPath", "PurePosixPath")),
    *(f"pathlib._local.{kind}" for kind in ("Path", "PosixPath", "PurePosixPath")),
}
_NAMED_HERE = ("metadata", "filesystem", "planner")


def read_metadata(folder: Path) -> Metadata:
    """The tensors of a checkpoint and where they lie, from its .metadata. A `UserError` if the file says anything else."""
    with refusing_damage(folder / FILE):
        return _checked(folder, read_records((folder / FILE).read_bytes(), _known))


def _known(module: str, name: str) -> None:
    """Refuse a name that a .metadata file never asks for. The others become records; none is looked up."""
    of_torch = module.startswith(_TORCH) and module.removeprefix(_TORCH) in _NAMED_HERE and name.isidentifier()
    if not of_torch and f"{module}.{name}" not in _OTHER_NAMES:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _is(value: Any, name: str) -> bool:
    return isinstance(value, Record) and value.name == _TORCH + name


def _fields(record: Any, name: str) -> dict[str, Any]:
    if not _is(record, name) or not isinstance(record.state, dict):
        raise ValueError(f"it has something else where a {name.partition('.')[2]} belongs")
    return dict(record.state)


def _size(value: Any) -> torch.Size:
    if not isinstance(value, torch.Size | tuple | list) or not all(type(n) is int and 0 <= n < 1 << 48 for n in value):
        raise ValueError(f"it has {str(value)[:40]} where a size belongs")
    return torch.Size(value)


def _checked(folder: Path, content: Any) -> Metadata:
    facts = _fields(content, "metadata.Metadata")
    tensors, places = facts["state_dict_metadata"], facts["storage_data"]
    if type(tensors) is not dict or type(places) is not dict or not all(type(key) is str for key in tensors):
        raise ValueError("it has no table of tensors")
    storage, sizes = {}, {}
    for index, info in places.items():
        key, place = _index(index), _place(info)
        if place.relative_path not in sizes:
            sizes[place.relative_path] = _file_size(folder / place.relative_path)
        if place.offset + place.length > sizes[place.relative_path]:
            raise ValueError(f"{key.fqn} lies outside {place.relative_path}")
        storage[key] = place
    described = {key: _description(key, value) for key, value in tensors.items()}
    for key, stored in described.items():
        for chunk in stored.chunks if isinstance(stored, TensorStorageMetadata) else ():
            if MetadataIndex(key, chunk.offsets) not in storage:
                raise ValueError(f"it does not say where a part of {key} lies")
    return Metadata(described, storage_data=storage)


def _file_size(path: Path) -> int:
    """Bytes of a file of the checkpoint. A missing file, and a link to one outside the checkpoint, is refused."""
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        raise ValueError(f"{path.name} is a link to {path.resolve()}, outside the checkpoint")
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    return path.stat().st_size


def _index(record: Any) -> MetadataIndex:
    facts = _fields(record, "metadata.MetadataIndex")
    if type(facts["fqn"]) is not str or not isinstance(facts.get("index"), int | None):
        raise ValueError("it has an entry without a name")
    offset = facts.get("offset")
    return MetadataIndex(facts["fqn"], None if offset is None else _size(offset), facts.get("index"))


def _place(record: Any) -> _StorageInfo:
    facts = _fields(record, "filesystem._StorageInfo")
    path, offset, length = facts["relative_path"], facts["offset"], facts["length"]
    if type(path) is not str or Path(path).name != path or path in ("", ".", ".."):
        raise ValueError(f"it names {str(path)[:80]!r}, which lies outside the checkpoint")
    if facts.get("transform_descriptors") or not all(type(n) is int and n >= 0 for n in (offset, length)):
        raise ValueError(f"it does not say which bytes of {path} to read")
    return _StorageInfo(path, offset, length)


def _description(key: str, record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if _is(record, "metadata.BytesStorageMetadata"):
        return BytesStorageMetadata()
    facts = _fields(record, "metadata.TensorStorageMetadata")
    properties = facts["properties"]
    dtype = properties.state[0] if _is(properties, "metadata.TensorProperties") else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"it has no dtype for {key}")
    size, chunks = _size(facts["size"]), []
    for chunk in facts["chunks"]:
        place = _fields(chunk, "metadata.ChunkStorageMetadata")
        offsets, sizes = _size(place["offsets"]), _size(place["sizes"])
        if not len(offsets) == len(sizes) == len(size) or any(
            start + length > whole for start, length, whole in zip(offsets, sizes, size, strict=True)
        ):
            raise ValueError(f"a part of {key} lies outside it")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    if len({chunk.offsets for chunk in chunks}) < len(chunks):
        raise ValueError(f"it has a part of {key} twice")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)
