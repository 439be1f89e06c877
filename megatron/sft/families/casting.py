"""Weights to another precision, with a count of the values that the precision cannot hold."""

import threading

import torch
from torch import Tensor

# Values looked at together, so that counting needs little memory.
_CHUNK = 1 << 22
NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Caster:
    """Casts tensors and counts: `values` seen, `rounded` to another value, `overflowed` to infinity."""

    def __init__(self) -> None:
        self.values = self.rounded = self.overflowed = 0
        self._lock = threading.Lock()
        self._kinds: set[tuple[torch.dtype, torch.dtype]] = set()

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if tensor.dtype == dtype:
            return tensor
        result = tensor.to(dtype)
        rounded = overflowed = 0
        if torch.finfo(dtype).bits <= torch.finfo(tensor.dtype).bits:
            for before, after in zip(_chunks(tensor), _chunks(result), strict=True):
                # Widened, so that a comparison does not round.
                rounded += int((before.float() != after.float()).sum())
                overflowed += int((after.isinf() & ~before.isinf()).sum())
        with self._lock:
            self._kinds.add((tensor.dtype, dtype))
            self.values += tensor.numel()
            self.rounded += rounded
            self.overflowed += overflowed
        return result

    def report(self) -> str:
        """`cast float32 to bfloat16: 12 of 100 values rounded, 0 overflow`, or `` where nothing was cast."""
        if not self._kinds:
            return ""
        kinds = ", ".join(sorted(f"{_name(a)} to {_name(b)}" for a, b in self._kinds))
        return f"cast {kinds}: {self.rounded:,} of {self.values:,} values rounded, {self.overflowed:,} overflow"


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.reshape(-1).split(_CHUNK)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
