"""safetensors files: the header checked in full before anything is read, tensors mapped, files written as they come.

Mapped tensors take no memory of their own, and a file is written with one tensor in memory at a time.
"""

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.sft.runtime.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The format's own limit.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Entry:
    """A tensor's dtype and shape, and its place in the file in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """A safetensors file opened for reading. One whose header does not describe its content exactly is a `UserError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        try:
            with open(path, "rb") as file:
                size = path.stat().st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
            self.entries = _checked_entries(header, 8 + length, size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}): download the model again") from None

    def tensor(self, name: str) -> Tensor:
        """A tensor that lies in the file, not in memory; what is written into it does not reach the file."""
        entry = self.entries[name]
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        flat = torch.frombuffer(self._map, dtype=entry.dtype, count=prod(entry.shape), offset=entry.start)
        return flat.view(entry.shape)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return dict(pairs)


def _checked_entries(header: dict[str, Any], data_start: int, size: int) -> dict[str, Entry]:
    """The entries, which must fill the rest of the file without gaps or overlaps."""
    header.pop("__metadata__", None)
    entries = {}
    for name, facts in header.items():
        start, end = facts["data_offsets"]
        shape = tuple(facts["shape"])
        if not all(type(number) is int for number in (start, end, *shape)):
            raise ValueError(f"{name} has something else than whole numbers for its shape and place")
        if facts["dtype"] not in DTYPES:
            raise ValueError(f"{name} has the unknown dtype {facts['dtype']!r}")
        dtype = DTYPES[facts["dtype"]]
        if min(shape, default=0) < 0 or end - start != prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} of shape {list(shape)} has {end - start} bytes")
        entries[name] = Entry(dtype, shape, data_start + start, data_start + end)
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise ValueError(f"{name} begins at byte {entry.start}, the tensor before it ends at {position}")
        position = entry.end
    if position != size:
        raise ValueError(f"tensors of {position} bytes in a file of {size}")
    return entries


def write_file(path: Path, plan: dict[str, Tensor], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write one file. `plan` has a tensor of the right dtype and shape (a meta tensor will do) for each name, in order;
    `tensors` then gives the tensors themselves in the same order.

    In the file they lie as safetensors itself would put them, wide dtypes first, then by name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, starts = 0, {}
    for name, tensor in sorted(plan.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        starts[name], end = position, position + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, expected in plan.items():
            given, tensor = next(tensors)
            assert given == name and tensor.dtype == expected.dtype and tensor.shape == expected.shape, name
            file.seek(8 + len(text) + starts[name])
            file.write(tensor_bytes(tensor))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's bytes without a copy; another is made contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)
