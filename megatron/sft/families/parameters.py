"""Whole Megatron parameters, one at a time: what every reader of weights gives and every writer takes, in any precision."""

import sys
import threading
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.sft.families.weight_names import WeightEntry

# What a command line calls the dtypes.
DTYPE_OPTIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Values compared at a time, so that counting needs little memory.
_CHUNK = 1 << 22


class Parameters(Protocol):
    """Where whole Megatron parameters come from: a Hugging Face folder, or a checkpoint in one of the formats.

    Several threads may read at the same time.
    """

    def meta(self, entry: WeightEntry) -> Tensor:
        """The parameter's dtype and shape, as a meta tensor."""

    def read(self, entry: WeightEntry) -> Tensor:
        """The parameter in CPU memory, or mapped from a file: it must not be changed."""


class CastParameters:
    """The parameters of `source` in another precision; buffers keep theirs."""

    def __init__(self, source: Parameters, dtype: torch.dtype, caster: "Caster") -> None:
        self._source, self._dtype, self._caster = source, dtype, caster

    def meta(self, entry: WeightEntry) -> Tensor:
        found = self._source.meta(entry)
        return found if entry.is_buffer else found.to(self._dtype)

    def read(self, entry: WeightEntry) -> Tensor:
        found = self._source.read(entry)
        return found if entry.is_buffer else self._caster.cast(found, self._dtype)


class WatchedParameters:
    """The parameters of `source`, with a progress bar of bytes on a terminal. `num_bytes`: of all `entries` together."""

    def __init__(self, source: Parameters, entries: Iterable[WeightEntry], what: str) -> None:
        self._source = source
        self.num_bytes = sum(source.meta(entry).nbytes for entry in entries)
        self._bar = progress_bar(self.num_bytes, what)

    def meta(self, entry: WeightEntry) -> Tensor:
        return self._source.meta(entry)

    def read(self, entry: WeightEntry) -> Tensor:
        parameter = self._source.read(entry)
        self._bar.update(parameter.nbytes)
        return parameter


def progress_bar(num_bytes: int, what: str) -> Any:
    """A bar of bytes on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    return tqdm(total=num_bytes, desc=what, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False)


class Caster:
    """Casts tensors and counts: `values` cast, `rounded` to another value, `overflowed` to infinity. Threads may share it."""

    def __init__(self) -> None:
        self.values = self.rounded = self.overflowed = 0
        self._lock = threading.Lock()
        self._kinds: set[str] = set()

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in `dtype`; the tensor itself where it has that dtype already."""
        if tensor.dtype == dtype:
            return tensor
        result = tensor.to(dtype)
        rounded = overflowed = 0
        if torch.finfo(dtype).bits <= torch.finfo(tensor.dtype).bits:
            pairs = zip(tensor.reshape(-1).split(_CHUNK), result.reshape(-1).split(_CHUNK), strict=True)
            for before, after in pairs:
                # Widened, so that the comparison does not round.
                rounded += int((before.float() != after.float()).sum())
                overflowed += int((after.isinf() & ~before.isinf()).sum())
        with self._lock:
            self._kinds.add(f"{tensor.dtype} to {dtype}".replace("torch.", ""))
            self.values += tensor.numel()
            self.rounded += rounded
            self.overflowed += overflowed
        return result

    def report(self) -> str:
        """`cast float32 to bfloat16: 12 of 100 values rounded (which is usual), 0 overflow`; "" without a cast."""
        if not self._kinds:
            return ""
        kinds = ", ".join(sorted(self._kinds))
        rounded = f"{self.rounded:,} of {self.values:,} values rounded" + " (which is usual)" * bool(self.rounded)
        return f"cast {kinds}: {rounded}, {self.overflowed:,} overflow"
