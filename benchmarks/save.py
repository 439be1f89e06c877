"""What saving costs: checksums, and how long training stands still, for a state of any size in this process's memory.

python -m benchmarks.save FOLDER [--gigabytes 1] [--repeats 5]
"""

import hashlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Any

import torch

from megatron.sft.checkpoint.assembling import write_index
from megatron.sft.checkpoint.folder import iteration_path, put_in_place, remove_superfluous, unfinished_path
from megatron.sft.checkpoint.pieces import Piece
from megatron.sft.checkpoint.staging import Staging
from megatron.sft.checkpoint.writing import num_files, write_pieces
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
        _measure(arguments.folder, _pieces(arguments.gigabytes * 1e9), arguments.repeats)
    return 0


def _pieces(num_bytes: float) -> list[Piece]:
    pieces: list[Piece] = []
    while sum(piece.num_bytes for piece in pieces) < num_bytes:
        shape = _SHAPES[len(pieces) % len(_SHAPES)]
        values = torch.randn(shape, device=device.current())
        offsets = (0,) * len(shape)
        pieces.append(Piece(f"tensor.{len(pieces)}", offsets, shape, shape, values.dtype, _constant(values)))
    return pieces


def _constant(values: torch.Tensor) -> Any:
    return lambda: values


def _measure(folder: Path, pieces: list[Piece], repeats: int) -> None:
    size = sum(piece.num_bytes for piece in pieces)
    print(f"{size / 1e9:.2f} GB in {len(pieces)} tensors on {device.describe()}, {num_files(size)} files at once")
    staging = Staging()
    first = _seconds(lambda: staging.copy(pieces))
    copies, with_sums, without = [], [], []
    for number in range(1, repeats + 1):
        copies.append(_seconds(lambda: staging.copy(pieces)))
        staged = staging.copy(pieces)
        with_sums.append(_save(folder, 2 * number, staged, hashlib.sha256))
        without.append(_save(folder, 2 * number + 1, staged, _NoSum))
    stand, whole, plain = map(statistics.median, (copies, with_sums, without))
    print(f"copy into the CPU's memory    {first:.2f} s the first time, then {_all(copies)}")
    print(f"save with checksums           {_all(with_sums)}")
    print(f"save without                  {_all(without)}")
    print(f"checksums cost {whole - plain:+.2f} s, {100 * (whole - plain) / whole:+.0f} % of a save")
    print(f"an asynchronous save stands still for {100 * stand / (stand + whole):.0f} % of a synchronous one's time")


def _save(folder: Path, iteration: int, pieces: Sequence[Piece], checksum: Any) -> float:
    module: Any = hashlib
    module.sha256 = checksum
    beside = unfinished_path(folder, iteration)
    beside.mkdir(parents=True)
    started = time.monotonic()
    written = write_pieces(beside, 0, pieces, Event())
    put_in_place(folder, iteration, beside, {"files": write_index(beside, [written])})
    seconds = time.monotonic() - started
    module.sha256 = _SHA256
    remove_superfluous(folder, iteration, 1, 0)
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
