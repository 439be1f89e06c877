"""Writing this process's pieces of a checkpoint: several files at once, each flushed, its SHA-256 taken while it is written."""

import ctypes
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from megatron.sft.checkpoint.pieces import Piece

MAX_FILES = 16
_LEAST_BYTES_A_FILE = 16 << 20
# After so many bytes the disk is told to begin, so that it works while the next ones are hashed.
_FLUSH_BYTES = 8 << 20
_SYNC_FILE_RANGE_WRITE = 2


class CancelledError(Exception):
    """Another file of this save could not be written, or the save is not wanted any more."""


@dataclass(frozen=True)
class StoredPiece:
    """Where a box of a tensor lies."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    whole: tuple[int, ...]
    dtype: str
    file: str
    first_byte: int
    num_bytes: int


def stored_piece(values: dict[str, Any]) -> StoredPiece:
    """Of its fields as they come out of JSON."""
    sizes = {name: tuple(values[name]) for name in ("offsets", "sizes", "whole")}
    return StoredPiece(**{**values, **sizes})


@dataclass(frozen=True)
class Written:
    """What a process has written: name -> {"bytes", "sha256"}, as in the manifest, and its pieces."""

    files: dict[str, dict[str, Any]]
    pieces: list[StoredPiece]


class HashedFile:
    """A new file, for torch.save and others to write to, that takes its checksum on the way."""

    def __init__(self, path: Path, cancelled: Event | None = None) -> None:
        self.path = path
        self.num_bytes = 0
        # torch.save reports the first failed write as one of its own, without the reason.
        self.error: BaseException | None = None
        self._sha256 = hashlib.sha256()
        self._cancelled = cancelled
        self._flushed = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def write(self, data: Any) -> int:
        try:
            return self._write_hashed(memoryview(data).cast("B"))
        except BaseException as error:
            self.error = self.error or error
            raise

    def _write_hashed(self, view: memoryview) -> int:
        for start in range(0, len(view), _FLUSH_BYTES):
            if self._cancelled is not None and self._cancelled.is_set():
                raise CancelledError
            part = view[start : start + _FLUSH_BYTES]
            self._write(part)
            # Behind the write, so that the disk works meanwhile; its first part is still in the processor's cache.
            self._sha256.update(part)
        return len(view)

    def _write(self, part: memoryview) -> None:
        while len(part):
            written = os.write(self._descriptor, part)
            part = part[written:]
            self.num_bytes += written
        if self.num_bytes - self._flushed >= _FLUSH_BYTES:
            _begin_flush(self._descriptor, self._flushed, self.num_bytes - self._flushed)
            self._flushed = self.num_bytes

    def as_stream(self) -> Any:
        """For torch.save, which writes to whatever has `write` and `flush`."""
        return self

    def flush(self) -> None:
        """torch.save calls it; `record` flushes."""

    def record(self) -> dict[str, Any]:
        """Flush to the disk and close; size and checksum, as in the manifest."""
        os.fsync(self._descriptor)
        self.close()
        return {"bytes": self.num_bytes, "sha256": self._sha256.hexdigest()}

    def close(self) -> None:
        """Close what `record` has not closed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _begin_flush(descriptor: int, first_byte: int, num_bytes: int) -> None:
    if _sync_file_range is not None:
        _sync_file_range(descriptor, ctypes.c_int64(first_byte), ctypes.c_int64(num_bytes), _SYNC_FILE_RANGE_WRITE)


# Not every system has it; fsync does the work in any case.
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)


def num_files(num_bytes: int) -> int:
    """Files, and threads, of this process: the machine's cores shared between its processes."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(cores, MAX_FILES, num_bytes // _LEAST_BYTES_A_FILE))


def write_pieces(folder: Path, rank: int, pieces: Sequence[Piece], cancelled: Event) -> Written:
    """Write the pieces as megatron-core's and torch's own loaders expect them. The first error stops all files."""
    groups = _shared_out(pieces, num_files(sum(piece.num_bytes for piece in pieces)))
    paths = [folder / f"__{rank}_{number}.distcp" for number in range(len(groups))]
    with ThreadPoolExecutor(max_workers=max(1, len(groups)), thread_name_prefix="checkpoint") as pool:
        jobs = [pool.submit(_write_file, *job, cancelled) for job in zip(paths, groups, strict=True)]
        errors = [error for job in jobs if (error := job.exception()) is not None]
    if errors:
        # The others say only that they were told to stop.
        raise next((error for error in errors if not isinstance(error, CancelledError)), errors[0])
    results = [job.result() for job in jobs]
    files = {path.name: record for path, (record, _) in zip(paths, results, strict=True)}
    return Written(files, [stored for _, parts in results for stored in parts])


def _shared_out(pieces: Sequence[Piece], count: int) -> list[list[Piece]]:
    """About as many bytes in each group; none is empty."""
    groups: list[list[Piece]] = [[] for _ in range(count)]
    loads = [0] * count
    for piece in sorted(pieces, key=lambda piece: piece.num_bytes, reverse=True):
        least = loads.index(min(loads))
        groups[least].append(piece)
        loads[least] += piece.num_bytes
    return [group for group in groups if group]


def _write_file(path: Path, pieces: Sequence[Piece], cancelled: Event) -> tuple[dict[str, Any], list[StoredPiece]]:
    stored = []
    file = HashedFile(path, cancelled)
    try:
        for piece in pieces:
            first_byte = file.num_bytes
            torch.save(_alone(piece), file.as_stream())
            place = (path.name, first_byte, file.num_bytes - first_byte)
            dtype = str(piece.dtype).removeprefix("torch.")
            stored.append(StoredPiece(piece.key, piece.offsets, piece.sizes, piece.whole, dtype, *place))
        return file.record(), stored
    except BaseException as error:
        cancelled.set()
        raise (file.error or error) from None
    finally:
        file.close()


def _alone(piece: Piece) -> Tensor:
    """The values in CPU memory that holds nothing else; torch.save writes all of a tensor's memory."""
    values = piece.values().detach().to("cpu", piece.dtype).contiguous()
    if values.untyped_storage().nbytes() != piece.num_bytes:
        values = values.clone()
    return values.view(piece.sizes)
