"""A Hugging Face folder's weights as whole Megatron parameters, one at a time."""

import zlib

import torch
from torch import Tensor

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.parameters import Caster
from megatron.sft.families.weight_names import WeightEntry, checked_to_megatron, weight_entries
from megatron.sft.hf.folder import HFFolder
from megatron.sft.hf.safetensors_file import tensor_bytes
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import sha256_of_text


class HFParameters:
    """The parameters of a Hugging Face folder, cast to `dtype` if one is given; buffers keep theirs.

    Tokens of the tokenizer beyond the embedding's rows get new rows (`with_new_rows`). `crc32`: name of each Hugging Face
    tensor read so far -> CRC-32 of the bytes that were returned. Several threads may read.
    """

    def __init__(self, folder: HFFolder, dtype: torch.dtype | None) -> None:
        self.folder = folder
        self.architecture: Architecture = folder.architecture
        self.dtype = dtype
        self.caster = Caster()
        self.crc32: dict[str, int] = {}
        self._crc32_on_disk: dict[str, int] = {}
        self._buffers = {name for entry in weight_entries(folder.architecture) if entry.is_buffer for name in entry.hf}

    def meta(self, entry: WeightEntry) -> Tensor:
        tensors = [self.hf_meta(name) for name in entry.hf]
        return checked_to_megatron(entry, self.architecture, tensors, str(self.folder.path))

    def hf_meta(self, name: str) -> Tensor:
        """Dtype and shape of a Hugging Face tensor as `hf_tensor` returns it. One of whole numbers is a `UserError`."""
        dtype, shape = self.folder.dtype_and_shape(name)
        if not dtype.is_floating_point:
            raise UserError(f"{self.folder.path}: tensor {name} is of dtype {dtype}: quantised weights are not read")
        if self._is_embedding(name) and shape and shape[0] == self.folder.rows_on_disk:
            shape = (self.architecture.vocab_size, *shape[1:])
        kept = self.dtype is None or name in self._buffers
        return torch.empty(shape, dtype=dtype if kept else self.dtype, device="meta")

    def read(self, entry: WeightEntry) -> Tensor:
        tensors = [self.hf_tensor(name) for name in entry.hf]
        return checked_to_megatron(entry, self.architecture, tensors, str(self.folder.path))

    def hf_tensor(self, name: str) -> Tensor:
        """A Hugging Face tensor, with new rows and cast. A value that is not finite is a `UserError`."""
        on_disk = tensor = self.folder.tensor(name)
        self._check(name)
        if self._is_embedding(name) and len(tensor) < self.architecture.vocab_size:
            tensor = with_new_rows(tensor, self.architecture.vocab_size)
        if self.dtype is not None and name not in self._buffers:
            tensor = self.caster.cast(tensor, self.dtype)
        self.crc32[name] = self._crc32_on_disk[name] if tensor is on_disk else zlib.crc32(tensor_bytes(tensor))
        return tensor

    def check_all(self) -> None:
        """Check all tensors on disk for NaN and infinity. May run in another thread while parameters are read."""
        for entry in weight_entries(self.architecture):
            for name in entry.hf:
                self._check(name)

    def _check(self, name: str) -> None:
        """Note the checksum of a tensor on disk; a value that is not finite is a `UserError`."""
        if name in self._crc32_on_disk:
            return
        tensor = self.folder.tensor(name)
        if tensor.numel():
            low, high = torch.aminmax(tensor)
            if not (low.isfinite() and high.isfinite()):
                raise UserError(f"{self.folder.path}: tensor {name} holds NaN or infinity: download the model again")
        self._crc32_on_disk[name] = zlib.crc32(tensor_bytes(tensor))

    def fingerprint(self) -> str:
        """SHA-256 of the checksums of all tensors on disk, read or not."""
        self.check_all()
        return sha256_of_text(repr(sorted(self._crc32_on_disk.items())))

    def _is_embedding(self, name: str) -> bool:
        return name in ("model.embed_tokens.weight", "lm_head.weight")


def with_new_rows(rows: Tensor, num_rows: int, seed: int = 1234) -> Tensor:
    """[num_rows, width]: the rows, then new rows: each column's mean plus noise of a tenth of its standard deviation."""
    total = torch.zeros(rows.shape[1])
    squares = torch.zeros(rows.shape[1])
    for part in rows.split(4096):
        total += part.float().sum(0)
        squares += part.float().square().sum(0)
    mean = total / len(rows)
    spread = (squares / len(rows) - mean.square()).clamp(min=0).sqrt()
    noise = torch.randn(num_rows - len(rows), rows.shape[1], generator=torch.Generator().manual_seed(seed))
    return torch.cat([rows, (mean + 0.1 * spread * noise).to(rows.dtype)])
