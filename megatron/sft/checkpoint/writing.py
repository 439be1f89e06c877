"""Writing a torch_dist checkpoint: each process its slices, in several files at once, then one process the index of all.

A run writes a copy of its state in the background, a conversion fetches each parameter when its turn comes. The files are those
that megatron-core's and torch's own loaders read.
"""

import ctypes
import hashlib
import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron.sft.checkpoint import metadata_file
from megatron.sft.checkpoint.shard_slice import ShardSlice, balanced

# What megatron-core asks of a checkpoint's content: optimizer state in the shape of the parameters, for any layout.
CONTENT_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
MAX_FILES = 16
# A smaller file takes longer to make and to flush than it gains.
_LEAST_BYTES_A_FILE = 16 << 20
# The disk starts on each part of this size while the next one is hashed.
_FLUSH_BYTES = 8 << 20
_SYNC_FILE_RANGE_WRITE = 2


class CancelledError(Exception):
    """Another file of this save could not be written, or the save is not wanted any more."""


@dataclass(frozen=True)
class StoredSlice:
    """Where a slice of a tensor lies: `num_bytes` from `first_byte` of `file`, as torch.save writes a tensor."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    whole: tuple[int, ...]
    dtype: str  # "bfloat16"
    file: str
    first_byte: int
    num_bytes: int


@dataclass(frozen=True)
class WrittenPart:
    """What one process has written: file name -> {"bytes", "sha256"}, as in the manifest, and the slices in the files."""

    files: dict[str, dict[str, Any]]
    slices: list[StoredSlice]


def part_from_json(content: dict[str, Any]) -> WrittenPart:
    """The inverse of `asdict` after a way through JSON, which makes lists of tuples."""
    tuples = ({**stored, **{n: tuple(stored[n]) for n in ("offsets", "sizes", "whole")}} for stored in content["slices"])
    return WrittenPart(content["files"], [StoredSlice(**stored) for stored in tuples])


class HashedFile:
    """A new file for torch.save to write to, whose SHA-256 is taken while it is written and which is flushed at the end."""

    def __init__(self, path: Path, cancelled: Event | None = None) -> None:
        self.path = path
        self.num_bytes = 0
        # For a failed write torch.save raises another error, without the reason.
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
            # After the write: the disk works meanwhile, and the part is still in the processor's cache.
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
    """Files, and threads, for this process's bytes: the machine's cores shared between its processes."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(cores, MAX_FILES, num_bytes // _LEAST_BYTES_A_FILE))


def write_slices(
    folder: Path, rank: int, slices: Sequence[ShardSlice], cancelled: Event, max_files: int = MAX_FILES
) -> WrittenPart:
    """Write the slices of process `rank`, at most `max_files` at a time. The first error stops all files and is raised."""
    sizes = [part.num_bytes for part in slices]
    groups = [group for group in balanced(sizes, min(max_files, num_files(sum(sizes)))) if group]
    paths = [folder / f"__{rank}_{index}.distcp" for index in range(len(groups))]
    with _threads(max(1, len(groups))) as pool:
        contents = [[slices[index] for index in group] for group in groups]
        jobs = [pool.submit(_write_file, *job, cancelled) for job in zip(paths, contents, strict=True)]
        errors = [error for job in jobs if (error := job.exception()) is not None]
    if errors:
        # The other files were only stopped by the first.
        raise next((error for error in errors if not isinstance(error, CancelledError)), errors[0])
    results = [job.result() for job in jobs]
    files = {path.name: record for path, (record, _) in zip(paths, results, strict=True)}
    return WrittenPart(files, [stored for _, parts in results for stored in parts])


@contextmanager
def _threads(number: int) -> Iterator[ThreadPoolExecutor]:
    """Threads whose torch.save computes no checksums, as the manifest has those of whole files.

    Some versions of torch have that switch for each thread, others for the process, whose other files need it as it was.
    """
    switch, before = torch.serialization.set_crc32_options, torch.serialization.get_crc32_options()
    try:
        with ThreadPoolExecutor(number, "checkpoint", switch, (False,)) as pool:
            yield pool
    finally:
        switch(before)


def _write_file(path: Path, slices: Sequence[ShardSlice], cancelled: Event) -> tuple[dict[str, Any], list[StoredSlice]]:
    stored = []
    file = HashedFile(path, cancelled)
    try:
        for part in slices:
            first_byte = file.num_bytes
            torch.save(_own_storage(part), file.as_stream())
            place = (path.name, first_byte, file.num_bytes - first_byte)
            dtype = str(part.dtype).removeprefix("torch.")
            stored.append(StoredSlice(part.key, part.offsets, part.sizes, part.whole, dtype, *place))
        return file.record(), stored
    except BaseException as error:
        cancelled.set()
        raise (file.error or error) from None
    finally:
        file.close()


def _own_storage(part: ShardSlice) -> Tensor:
    """The values in CPU memory that holds nothing else: torch.save writes all of a tensor's memory."""
    values = part.values().detach().to("cpu", part.dtype).contiguous()
    if values.untyped_storage().nbytes() != part.num_bytes:
        values = values.clone()
    return values.view(part.sizes)


def write_index(
    folder: Path, parts: Sequence[WrittenPart], omitted: Mapping[str, int] | None = None
) -> dict[str, dict[str, Any]]:
    """Write `.metadata`, `metadata.json` and `common.pt`; returns all files of the checkpoint for its manifest.

    omitted: how many values of which tensors the checkpoint does not have.
    """
    files = {name: record for part in parts for name, record in part.files.items()}
    index = _index([stored for part in parts for stored in part.slices], omitted or {})
    contents = {
        metadata_file.FILE: pickle.dumps(index),
        "metadata.json": json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}).encode(),
    }
    for name, content in contents.items():
        file = HashedFile(folder / name)
        file.write(content)
        files[name] = file.record()
    common = HashedFile(folder / "common.pt")
    torch.save({"content_metadata": CONTENT_METADATA}, common.as_stream())
    files["common.pt"] = common.record()
    return files


def _index(slices: Sequence[StoredSlice], omitted: Mapping[str, int]) -> Metadata:
    """torch's index of the slices, which must make up every tensor exactly, but for what is omitted."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for part in slices:
        properties = TensorProperties(dtype=getattr(torch, part.dtype))
        tensor = tensors.setdefault(part.key, TensorStorageMetadata(properties, torch.Size(part.whole), []))
        offsets = torch.Size(part.offsets)
        tensor.chunks.append(ChunkStorageMetadata(offsets, torch.Size(part.sizes)))
        places[MetadataIndex(part.key, offsets)] = _StorageInfo(part.file, part.first_byte, part.num_bytes)
    assert len(places) == len(slices), "a part of a tensor was written twice"
    for key, tensor in tensors.items():
        written, expected = sum(prod(chunk.sizes) for chunk in tensor.chunks), prod(tensor.size) - omitted.get(key, 0)
        assert written == expected, f"{written} of {expected} values of {key} were written"
    return Metadata({**tensors}, storage_data=places)
