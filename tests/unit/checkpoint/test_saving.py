"""What is saved where, what is removed, and room on the disk."""

from pathlib import Path

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
