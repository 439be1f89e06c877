"""What saving costs: checksums, and how long training stalls, for a state of any size in this process's memory.

python -m benchmarks.save FOLDER [--gigabytes 1] [--repeats 5]
"""

import hashlib
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch

from megatron.sft.checkpoint.folder import Kept, iteration_path, put_in_place, remove_old_checkpoints, unfinished_path
from megatron.sft.checkpoint.shard_slice import ShardSlice
from megatron.sft.checkpoint.staging import Staging
from megatron.sft.checkpoint.writing import num_files, write_index, write_slices
from megatron.sft.runtime import device
from megatron.sft.runtime.errors import OneLineParser, run

# The matrices of a layer and an embedding, so that the parts differ as in a model.
_SHAPES = ((1536, 1536), (8960, 1536), (1536, 8960), (512, 1536), (37984, 1536))


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="benchmark_save", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write; on the disk that is to be measured")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    device.prepare()
    with device.process_group():
        _measure(arguments.folder, _random_slices(arguments.gigabytes * 1e9), arguments.repeats)
    return 0


def _random_slices(num_bytes: float) -> list[ShardSlice]:
    slices: list[ShardSlice] = []
    while sum(part.num_bytes for part in slices) < num_bytes:
        shape = _SHAPES[len(slices) % len(_SHAPES)]
        values = torch.randn(shape, device=device.current())
        place = ((0,) * len(shape), shape, shape)
        slices.append(ShardSlice(f"tensor.{len(slices)}", *place, values.dtype, partial(torch.Tensor.detach, values)))
    return slices


def _measure(folder: Path, slices: list[ShardSlice], repeats: int) -> None:
    size = sum(part.num_bytes for part in slices)
    print(f"{size / 1e9:.2f} GB in {len(slices)} tensors on {device.device_name()}, {num_files(size)} files at once")
    staging = Staging()
    first = _seconds(lambda: staging.copy(slices))
    copies, with_sums, without = [], [], []
    for index in range(1, repeats + 1):
        copies.append(_seconds(lambda: staging.copy(slices)))
        staged = staging.copy(slices)
        with_sums.append(_save(folder, 2 * index, staged, hashlib.sha256))
        without.append(_save(folder, 2 * index + 1, staged, _NoSum))
    stand, whole, plain = map(statistics.median, (copies, with_sums, without))
    print(f"copy into the CPU's memory    {first:.2f} s the first time, then {_all(copies)}")
    print(f"save with checksums           {_all(with_sums)}")
    print(f"save without                  {_all(without)}")
    print(f"checksums cost {whole - plain:+.2f} s, {100 * (whole - plain) / whole:+.0f} % of a save")
    print(f"an asynchronous save stalls training for {100 * stand / (stand + whole):.0f} % of a synchronous one's time")


def _save(folder: Path, iteration: int, slices: Sequence[ShardSlice], checksum: Any) -> float:
    module: Any = hashlib
    module.sha256 = checksum
    staged = unfinished_path(folder, iteration)
    staged.mkdir(parents=True)
    started = time.monotonic()
    written = write_slices(staged, 0, slices, Event())
    put_in_place(folder, iteration, staged, {"files": write_index(staged, [written])})
    seconds = time.monotonic() - started
    module.sha256 = _SHA256
    remove_old_checkpoints(folder, iteration, Kept(last=1))
    assert iteration_path(folder, iteration).is_dir()
    return seconds


_SHA256 = hashlib.sha256


class _NoSum:
    """A checksum that costs nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def update(self, data: Any) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


def _seconds(work: Any) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def _all(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s (median of {', '.join(f'{s:.2f}' for s in sorted(seconds))})"


if __name__ == "__main__":
    run(main)
