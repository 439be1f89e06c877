"""A copy of a run's state in CPU memory, from which a checkpoint is written while training changes the state itself."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron.sft.checkpoint.pieces import Piece
from megatron.sft.runtime import device

_ALIGNMENT = 64
# cudaHostRegister takes whole buffers; smaller ones let training's own calls in between.
_BUFFER_BYTES = 1 << 30


class Staging:
    """Buffers for one process's pieces, made once and used for every save. On a GPU machine they are page-locked."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._sizes: list[int] = []

    def fits(self, pieces: Sequence[Piece]) -> bool:
        """Whether the buffers are there already."""
        return self._sizes == _plan(pieces)[1]

    def allocate(self, pieces: Sequence[Piece]) -> None:
        """Make the buffers for such pieces; takes seconds where they are page-locked."""
        sizes = _plan(pieces)[1]
        self._sizes, self._buffers = [], []
        for size in sizes:
            buffer = torch.empty(size, dtype=torch.uint8)
            buffer[::4096] = 0  # the system gives memory when it is touched
            if device.has_gpu():
                _lock_pages(buffer)
            self._buffers.append(buffer)
        self._sizes = sizes

    def copy(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The same pieces with their values as they are now."""
        if not self.fits(pieces):
            self.allocate(pieces)
        staged = []
        for piece, (number, start) in zip(pieces, _plan(pieces)[0], strict=True):
            target = _slice(self._buffers[number], start, piece)
            target.copy_(piece.values().detach().view(-1), non_blocking=True)
            staged.append(replace(piece, values=_constant(target)))
        device.synchronize()
        return staged


def staged_bytes(pieces: Sequence[Piece]) -> int:
    """Memory that the buffers take."""
    return sum(_plan(pieces)[1])


def _plan(pieces: Sequence[Piece]) -> tuple[list[tuple[int, int]], list[int]]:
    """(buffer, first byte) of each piece, and the size of each buffer."""
    places, sizes = [], [0]
    for piece in pieces:
        length = -(-piece.num_bytes // _ALIGNMENT) * _ALIGNMENT
        if sizes[-1] and sizes[-1] + length > _BUFFER_BYTES:
            sizes.append(0)
        places.append((len(sizes) - 1, sizes[-1]))
        sizes[-1] += length
    return places, sizes


def _slice(buffer: Tensor, start: int, piece: Piece) -> Tensor:
    # Through numpy, so that the result's memory is the slice alone: torch.save writes all memory of a tensor.
    part = torch.from_numpy(buffer.numpy()[start : start + piece.num_bytes])
    return part.view(piece.dtype)


def _constant(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _lock_pages(buffer: Tensor) -> None:
    # Where the system does not allow it the copy takes longer, through the driver's own small buffers.
    torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)


class Preparation:
    """Makes the buffers in a thread of its own."""

    def __init__(self, staging: Staging, pieces: Sequence[Piece]) -> None:
        self._thread = threading.Thread(target=self._run, args=(staging, pieces), name="staging", daemon=True)
        self._device = device.current()
        self._thread.start()

    def wait(self) -> None:
        """Until they are made. If they cannot be, the save that needs them finds out."""
        self._thread.join()

    def _run(self, staging: Staging, pieces: Sequence[Piece]) -> None:
        with contextlib.suppress(RuntimeError, MemoryError):
            if device.has_gpu():
                torch.cuda.set_device(self._device)  # a thread begins with the first GPU
            staging.allocate(pieces)
