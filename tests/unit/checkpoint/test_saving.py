"""What is saved where, what is removed, and room on the disk."""

import io
import zipfile
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from megatron.sft.checkpoint.folder import check_room, checkpoints_to_delete
from megatron.sft.runtime.errors import UserError


def test_blocks_make_up_every_range_of_a_tensor_once() -> None:
    from megatron.sft.checkpoint.shard_slice import contiguous_blocks

    for shape in ((7,), (3, 4), (2, 3, 4), (5, 1, 3)):
        numbers = np.arange(np.prod(shape)).reshape(shape)
        for start in range(numbers.size):
            for stop in range(start + 1, numbers.size + 1):
                found = []
                for offsets, sizes, first in contiguous_blocks(shape, start, stop):
                    box = numbers[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].ravel()
                    assert box[0] == first and np.all(np.diff(box) == 1)  # contiguous in memory
                    found += box.tolist()
                assert found == list(range(start, stop))


def test_the_last_checkpoints_and_every_nth_are_kept() -> None:
    there = [100, 200, 300, 400, 500, 600]
    assert checkpoints_to_delete(there, 500, 0, 200) == []
    assert checkpoints_to_delete(there, 500, 1, 0) == [400, 300, 200, 100]
    assert checkpoints_to_delete(there, 500, 2, 200) == [300, 100]
    assert checkpoints_to_delete(there, 500, 9, 0) == []


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the checkpoint of iteration 3 needs 1010000\.00 GB"):
        check_room(tmp_path, 10**15, 3)


def test_files_that_others_save_in_this_process_keep_their_checksums(tmp_path: Path) -> None:
    import torch

    from megatron.sft.checkpoint.shard_slice import ShardSlice
    from megatron.sft.checkpoint.writing import write_slices

    values = torch.arange(6.0)
    part = ShardSlice("weight", (0,), (6,), (6,), torch.float32, lambda: values)
    write_slices(tmp_path, 0, [part], Event())
    assert _wrong_checksum(_saved(values)) is None
    with pytest.raises(FileNotFoundError):
        write_slices(tmp_path / "missing", 0, [part], Event())
    assert _wrong_checksum(_saved(values)) is None
    (written,) = tmp_path.glob("*.distcp")
    assert torch.equal(torch.load(written), values)
    assert _wrong_checksum(written) is not None  # computing it would take time: the manifest has another


def _saved(values: object) -> io.BytesIO:
    import torch

    file = io.BytesIO()
    torch.save(values, file)
    return file


def _wrong_checksum(file: Path | io.BytesIO) -> str | None:
    with zipfile.ZipFile(file) as archive:
        return archive.testzip()
