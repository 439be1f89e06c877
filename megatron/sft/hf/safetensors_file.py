"""safetensors files: tensors mapped, not read into memory, and files written with one tensor in memory at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.sft.runtime.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_LFS_POINTER = b"version https://git-lfs"  # what git leaves in place of a large file
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _check_pointer(path: Path) -> None:
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(
                f"{path} is a Git LFS pointer, not the weights: run git lfs pull in its folder, or download it again"
            )


class SafetensorsFile:
    """A safetensors file opened for reading. One whose header does not describe its content exactly is a `UserError`.

    `entries`: dtype and shape by name. A tensor of a dtype that is not in DTYPES is refused too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            _check_pointer(path)
            self._file = safe_open(path, framework="pt")
            # safetensors takes the last of two entries with one name.
            with open(path, "rb") as file:
                json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=_without_duplicates)
            slices = ((name, self._file.get_slice(name)) for name in self._file.keys())  # noqa: SIM118
            self.entries = {name: (DTYPES[part.get_dtype()], tuple(part.get_shape())) for name, part in slices}
        except KeyError as error:
            raise UserError(f"{path} has tensors of the dtype {error}, which is not supported") from None
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{path} is damaged ({error}): download the model again") from None

    def tensor(self, name: str) -> Tensor:
        """A tensor that lies in the file, not in memory; what is written into it does not reach the file."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return dict(pairs)


def write_file(path: Path, plan: dict[str, Tensor], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write one file. `plan`: name to dtype and shape (a meta tensor); `tensors`: the tensors themselves, in the same order.

    They lie in the file in the order that safetensors itself gives them: wide dtypes first, then by name.
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
