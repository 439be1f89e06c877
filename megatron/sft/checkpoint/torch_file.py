"""Files of torch.save: read without running what they pickle, their tensors mapped from the file, and written part by part.

Such a file is a zip archive without compression: a pickle, and the bytes of every tensor's storage.
"""

import argparse
import io
import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.sft.errors import UserError, first_line
from megatron.sft.safetensors_file import tensor_bytes

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool, "UntypedStorage": torch.uint8,
}  # fmt: skip
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


class Foreign:
    """Stands for an object of a class that is not loaded: it takes whatever it is made with and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Foreign":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "Foreign":
        return self

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _Storage:
    """A storage in the file: its dtype and its bytes."""

    def __init__(self, dtype: torch.dtype, content: memoryview) -> None:
        self.dtype = dtype
        self.content = content


def _rebuild_tensor(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if not len(storage.content):
        return torch.empty(size, dtype=storage.dtype)
    flat = torch.frombuffer(storage.content, dtype=storage.dtype)
    return flat.as_strided(tuple(size), tuple(stride), int(offset))


def _same_data(data: Any, *_: Any) -> Any:
    return data


class _Unpickler(pickle.Unpickler):
    """Makes tensors, plain values and argparse's namespaces; everything else becomes `Foreign`."""

    def __init__(self, data: bytes, storages: "_Archive") -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._archive = storages

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _same_data,
            ("collections", "OrderedDict"): OrderedDict,
            ("argparse", "Namespace"): argparse.Namespace,
            ("torch", "Size"): torch.Size,
        }
        if (module, name) in known:
            return known[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return Foreign

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, _count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it refers to {kind!r}")
        return _Storage(dtype, self._archive.record(f"data/{key}"))


class _Archive:
    def __init__(self, path: Path, writable: bool = False) -> None:
        with open(path, "r+b" if writable else "rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY)
        folders = {entry.filename.partition("/")[0] for entry in entries}
        if len(folders) != 1 or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is not an archive of torch.save")
        self._entries = {entry.filename.partition("/")[2]: entry for entry in entries}
        if "byteorder" in self._entries and bytes(self.record("byteorder")) != b"little":
            raise ValueError("its byte order is not this machine's")

    def record(self, name: str) -> memoryview:
        """The bytes of one record, in the file."""
        entry = self._entries[name]
        header = _LOCAL_HEADER.unpack_from(self.map, entry.header_offset)
        start = entry.header_offset + _LOCAL_HEADER.size + header[-2] + header[-1]
        if start + entry.file_size > len(self.map):
            raise ValueError(f"its record {name} ends outside the file")
        return memoryview(self.map)[start : start + entry.file_size]


def read(path: Path) -> Any:
    """The content of a file of torch.save. Nothing that it pickles is imported or called; tensors stay in the file."""
    try:
        archive = _Archive(path)
        return _Unpickler(bytes(archive.record("data.pkl")), archive).load()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the checkpoint is not whole, take another one") from None
    except Exception as error:
        raise UserError(
            f"{path} is damaged or not a file of torch.save ({first_line(error)}): take another checkpoint"
        ) from None


def write(path: Path, content: dict[str, Any], state: dict[str, Tensor], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write what torch.save would for `{**content, "model": state}`, with one tensor in memory at a time.

    `state` has the dtypes and shapes (meta tensors) and whatever is not a tensor; `tensors` gives the tensors in its order.
    """
    # Memory that is never touched is never taken.
    empty = {
        name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
        for name, value in state.items()
    }
    with torch.serialization.skip_data():
        torch.save({**content, "model": empty}, path)
    del empty
    archive = _Archive(path, writable=True)
    places = _Unpickler(bytes(archive.record("data.pkl")), archive).load()["model"]
    for name, tensor in tensors:
        place = places.pop(name)
        assert place.shape == tensor.shape and place.dtype == tensor.dtype, name
        tensor_bytes(place)[:] = tensor_bytes(tensor)
    assert not any(isinstance(value, Tensor) for value in places.values()), "a tensor was not written"
    archive.map.flush()
