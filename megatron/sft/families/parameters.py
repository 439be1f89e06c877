"""Whole Megatron parameters, one at a time: what every reader of weights gives and every writer takes."""

import sys
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.sft.families.casting import Caster
from megatron.sft.families.weight_names import WeightEntry


class Parameters(Protocol):
    """Where whole Megatron parameters come from: a Hugging Face folder, or a checkpoint in one of the formats."""

    def meta(self, entry: WeightEntry) -> Tensor:
        """The parameter's dtype and shape, as a meta tensor."""

    def read(self, entry: WeightEntry) -> Tensor:
        """The parameter."""


class CastParameters:
    """Those of `source` in another precision."""

    def __init__(self, source: Parameters, dtype: torch.dtype, caster: Caster) -> None:
        self._source, self._dtype, self._caster = source, dtype, caster

    def meta(self, entry: WeightEntry) -> Tensor:
        return self._source.meta(entry).to(self._dtype)

    def read(self, entry: WeightEntry) -> Tensor:
        return self._caster.cast(self._source.read(entry), self._dtype)


class WatchedParameters:
    """Those of `source`, with a progress bar of bytes on a terminal; the bar is full when `copies` of each were read."""

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
