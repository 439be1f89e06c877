"""Reading pieces of a run's state out of a `torch_dist` checkpoint of any layout, without running anything that is in it."""

import os
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron.sft.checkpoint.metadata_file import read_metadata
from megatron.sft.checkpoint.pieces import Piece
from megatron.sft.checkpoint.stored_tensors import read_chunk
from megatron.sft.runtime.errors import UserError


class PieceReader:
    """The tensors of one checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = read_metadata(folder)
        self._tensors = {
            key: facts
            for key, facts in self._metadata.state_dict_metadata.items()
            if isinstance(facts, TensorStorageMetadata)
        }
        self._pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def fill(self, pieces: list[Piece]) -> None:
        """Set the values of every piece. One that the checkpoint does not hold whole is a `UserError`."""
        lacking = sorted({piece.key for piece in pieces} - self._tensors.keys())
        if lacking:
            raise UserError(
                f"{self.folder} lacks {len(lacking)} entries, {lacking[0]} among them: convert the model again"
            )
        list(self._pool.map(self._fill, pieces))

    @torch.no_grad()
    def _fill(self, piece: Piece) -> None:
        stored = self._tensors[piece.key]
        rows = slice(1, None) if piece.padded else slice(None)
        if len(stored.size) != len(piece.whole) or tuple(stored.size)[rows] != piece.whole[rows]:
            raise UserError(
                f"{self.folder} holds {piece.key} as {tuple(stored.size)}, the model has {piece.whole}: "
                "take a checkpoint of this model"
            )
        target = piece.values().view(piece.sizes)
        if piece.padded:
            target.zero_()
        filled = sum(self._copy(piece, target, tuple(c.offsets), tuple(c.sizes)) for c in stored.chunks)
        there = zip(piece.offsets, piece.sizes, stored.size, strict=True)
        if filled != prod(max(0, min(start + size, whole) - start) for start, size, whole in there):
            raise UserError(f"{self.folder} holds {piece.key} only in part: take another checkpoint")

    def _copy(self, piece: Piece, target: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> int:
        """Copy what a stored box and the piece have in common; returns the number of values."""
        low = [max(a, b) for a, b in zip(piece.offsets, offsets, strict=True)]
        ends = zip(piece.offsets, piece.sizes, offsets, sizes, strict=True)
        high = [min(start + size, other + length) for start, size, other, length in ends]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return 0
        source = read_chunk(self.folder, self._metadata, MetadataIndex(piece.key, torch.Size(offsets)))
        target[_within(low, high, piece.offsets)].copy_(source[_within(low, high, offsets)])
        return prod(b - a for a, b in zip(low, high, strict=True))


def _within(low: list[int], high: list[int], offsets: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offsets, strict=True))
