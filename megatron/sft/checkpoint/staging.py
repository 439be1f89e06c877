"""A copy of a run's state in CPU memory, from which a checkpoint is written while training changes the state."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron.sft.checkpoint.shard_slice import ShardSlice
from megatron.sft.runtime import device

_ALIGNMENT = 64
# cudaHostRegister locks a whole buffer in one call; smaller buffers let training's own CUDA calls in between.
_BUFFER_BYTES = 1 << 30


class Staging:
    """Buffers for one process's slices, allocated once and used for every save. On a GPU machine they are page-locked."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._sizes: list[int] = []

    def has_capacity(self, slices: Sequence[ShardSlice]) -> bool:
        """Whether the buffers are allocated already for slices of these sizes."""
        return self._sizes == _plan(slices)[1]

    def allocate(self, slices: Sequence[ShardSlice]) -> None:
        """Allocate buffers for slices of these sizes, rounded up to 64 bytes each; takes seconds where they are page-locked."""
        sizes = _plan(slices)[1]
        self._sizes, self._buffers = [], []
        for size in sizes:
            buffer = torch.empty(size, dtype=torch.uint8)
            buffer[::4096] = 0  # the system provides a page of memory when it is first touched
            if device.has_gpu():
                lock_pages(buffer)
            self._buffers.append(buffer)
        self._sizes = sizes

    def copy(self, slices: Sequence[ShardSlice]) -> list[ShardSlice]:
        """The same slices with a copy of their values as they are now. The next call overwrites the copy."""
        if not self.has_capacity(slices):
            self.allocate(slices)
        staged = []
        for part, (index, start) in zip(slices, _plan(slices)[0], strict=True):
            target = _view(self._buffers[index], start, part)
            target.copy_(part.values().detach().view(-1), non_blocking=True)
            staged.append(replace(part, values=_constant(target)))
        device.synchronize()
        return staged


def staged_bytes(slices: Sequence[ShardSlice]) -> int:
    """Bytes of CPU memory that the buffers for these slices take."""
    return sum(_plan(slices)[1])


def _plan(slices: Sequence[ShardSlice]) -> tuple[list[tuple[int, int]], list[int]]:
    """(buffer, first byte) of each slice, and the size of each buffer."""
    places, sizes = [], [0]
    for part in slices:
        length = -(-part.num_bytes // _ALIGNMENT) * _ALIGNMENT
        if sizes[-1] and sizes[-1] + length > _BUFFER_BYTES:
            sizes.append(0)
        places.append((len(sizes) - 1, sizes[-1]))
        sizes[-1] += length
    return places, sizes


def _view(buffer: Tensor, start: int, part: ShardSlice) -> Tensor:
    # Through numpy, so that the result's memory is the slice alone: torch.save writes all memory of a tensor.
    return torch.from_numpy(buffer.numpy()[start : start + part.num_bytes]).view(part.dtype)


def _constant(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def lock_pages(buffer: Tensor) -> None:
    """Page-lock a buffer of the CPU's memory for copies by the GPU, until it is freed: others may get its addresses then."""
    runtime = torch.cuda.cudart()
    if runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0) == runtime.cudaError.success:
        weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr()).atexit = False
        return
    # Where the system refuses, the copy takes longer: it goes through small buffers of the driver. The next call of torch
    # would report the refusal as its own failure.
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device.current())


class BackgroundAllocation:
    """Allocates the buffers in another thread, so that the first save does not wait for them."""

    def __init__(self, staging: Staging, slices: Sequence[ShardSlice]) -> None:
        self._thread = threading.Thread(target=self._run, args=(staging, slices), name="staging", daemon=True)
        self._device = device.current()
        self._thread.start()

    def wait(self) -> None:
        """Wait until they are allocated. If they could not be, `copy` tries again and raises."""
        self._thread.join()

    def _run(self, staging: Staging, slices: Sequence[ShardSlice]) -> None:
        with contextlib.suppress(RuntimeError, MemoryError):
            if device.has_gpu():
                torch.cuda.set_device(self._device)  # a new thread's device is GPU 0
            staging.allocate(slices)
