"""Files of torch.save: read without running what they pickle, tensors mapped from the file, and written tensor by tensor.

Such a file is a zip archive without compression: a pickle, and the bytes of every tensor's storage.
"""

import argparse
import mmap
import pickle
import struct
import zipfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.sft.checkpoint.pickled import read_records, refusing_damage
from megatron.sft.hf.safetensors_file import tensor_bytes

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool, "UntypedStorage": torch.uint8,
}  # fmt: skip
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


class _Storage:
    """A storage in the file: its dtype and its bytes."""

    def __init__(self, dtype: torch.dtype, content: memoryview) -> None:
        self.dtype = dtype
        self.content = content


class _RebuildTensor:
    """Stands for torch._utils._rebuild_tensor_v2. It has no attributes that a pickle could set."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("it makes a tensor of something that is not in the file")
        room = len(storage.content) // storage.dtype.itemsize
        if prod(size) > room:
            raise pickle.UnpicklingError(f"it makes a tensor of {prod(size)} values from {room}")
        if not len(storage.content):
            return torch.empty(tuple(size), dtype=storage.dtype)
        flat = torch.frombuffer(storage.content, dtype=storage.dtype, count=room)
        return flat.as_strided(tuple(size), tuple(stride), int(offset))


class _SameData:
    """Stands for torch._utils._rebuild_parameter."""

    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Any:
        return data


def _known(module: str, name: str) -> Any:
    if module in ("torch", "torch.storage") and name in _STORAGES:
        return _STORAGES[name]
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
        return _RebuildTensor()
    if (module, name) == ("torch._utils", "_rebuild_parameter"):
        return _SameData()
    if (module, name) == ("argparse", "Namespace"):
        # A new class for each reading: the pickle may set its attributes.
        return type("Namespace", (argparse.Namespace,), {})
    return None


class _Archive:
    """The zip archive in `length` bytes of a file from `offset` on (all of them unless given), mapped, not read."""

    def __init__(self, path: Path, offset: int = 0, length: int | None = None, writable: bool = False) -> None:
        with open(path, "r+b" if writable else "rb") as file:
            length = path.stat().st_size - offset if length is None else length
            # A map begins at the start of a page. zipfile accepts what lies before the archive.
            self._start = offset % mmap.ALLOCATIONGRANULARITY
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY
            self.map = mmap.mmap(file.fileno(), self._start + length, access=access, offset=offset - self._start)
        with zipfile.ZipFile(self.map) as archive:  # type: ignore[call-overload]
            entries = archive.infolist()
        folders = {entry.filename.partition("/")[0] for entry in entries}
        if len(folders) != 1 or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is not an archive of torch.save")
        self._entries = {entry.filename.partition("/")[2]: entry for entry in entries}
        if "byteorder" in self._entries and bytes(self.record("byteorder")) != b"little":
            raise ValueError("its byte order is not this machine's")

    def record(self, name: str) -> memoryview:
        """The bytes of one record, in the file."""
        if name not in self._entries:
            raise ValueError(f"it has no record {name}")
        entry = self._entries[name]
        if entry.header_offset < self._start:
            raise ValueError(f"its record {name} begins outside the archive")
        header = _LOCAL_HEADER.unpack_from(self.map, entry.header_offset)
        start = entry.header_offset + _LOCAL_HEADER.size + header[-2] + header[-1]  # the lengths of name and extra field
        if start + entry.file_size > len(self.map):
            raise ValueError(f"its record {name} ends outside the archive")
        return memoryview(self.map)[start : start + entry.file_size]

    def _storage(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, _count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it refers to {kind!r}")
        return _Storage(dtype, self.record(f"data/{key}"))

    def content(self) -> Any:
        """What was saved, with `Record`s for whatever is neither a tensor nor a plain value."""
        return read_records(bytes(self.record("data.pkl")), _known, self._storage)


def read(path: Path) -> Any:
    """The content of a file of torch.save, with `Record`s for objects that are neither tensors nor plain values.

    Nothing that it pickles is imported or called; tensors are mapped from the file. A damaged file is a `UserError`.
    """
    with refusing_damage(path):
        return _Archive(path).content()


def read_tensor(path: Path, offset: int, length: int) -> Tensor:
    """The tensor that torch.save wrote to `length` bytes of a file from `offset` on, mapped. Anything else is a `UserError`."""
    with refusing_damage(path):
        tensor = _Archive(path, offset, length).content()
        if not isinstance(tensor, Tensor):
            raise ValueError(f"it holds no tensor at byte {offset}")
        return tensor


def write(path: Path, content: dict[str, Any], state: dict[str, Tensor], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write what torch.save would for `{**content, "model": state}`, with one tensor in memory at a time.

    `state` has the dtypes and shapes (meta tensors) and whatever is not a tensor; `tensors` gives the tensors in its order.
    """
    # Memory that is never touched is never allocated.
    empty = {
        name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
        for name, value in state.items()
    }
    with torch.serialization.skip_data():
        torch.save({**content, "model": empty}, path)
    del empty
    archive = _Archive(path, writable=True)
    places = archive.content()["model"]
    for name, tensor in tensors:
        place = places.pop(name)
        assert place.shape == tensor.shape and place.dtype == tensor.dtype, name
        tensor_bytes(place)[:] = tensor_bytes(tensor)
    assert not any(isinstance(value, Tensor) for value in places.values()), "a tensor was not written"
    archive.map.flush()
