"""How long a run will take: from a given speed, the speed of an earlier part of it, or an assumed share of the peak."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.sft.data.tokenized import MODE_FIRST, Index, TokenizedRows, data_file, read_index
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.flops import head_forward_flops, training_flops
from megatron.sft.reporting.curves import METRICS
from megatron.sft.runtime import device

ASSUMED_MFU = 0.40
# Dense bf16 peak of an H100 or H200, for a machine whose GPU is not known.
H100_TFLOPS = 989.4


@dataclass(frozen=True)
class RowLoad:
    """The average row: tokens, trained tokens, and the sum of its conversations' squared lengths (what attention costs)."""

    tokens: float
    trained_tokens: float
    sum_squared_lengths: float


def full_rows(seq_length: int) -> RowLoad:
    """Rows of one conversation each, as long as the row and all trained: the most expensive rows."""
    return RowLoad(seq_length, seq_length, float(seq_length) ** 2)


def measured_rows(rows: TokenizedRows) -> RowLoad:
    """The average over all rows of tokenised data."""
    lengths = conversation_lengths(read_index(data_file(rows.prefix, "idx")))
    num_rows, manifest = len(rows), rows.manifest
    squares = float((lengths.astype(np.float64) ** 2).sum())
    return RowLoad(manifest["tokens"] / num_rows, manifest["trained_tokens"] / num_rows, squares / num_rows)


def conversation_lengths(index: Index) -> np.ndarray:
    """[conversations] int64, tokens of each."""
    firsts = np.flatnonzero(index.modes & MODE_FIRST)
    return np.add.reduceat(index.lengths, firsts, dtype=np.int64)


def tokens_per_second(
    given: float,
    run_folder: Path,
    architecture: Architecture,
    load: RowLoad,
    num_processes: int,
    frozen: bool = False,
    two_heads: bool = False,
    recompute: float = 1.0,
) -> tuple[float, str]:
    """Tokens a second of all processes together, and the source of that figure in words. two_heads: the output head computes
    every trained token twice in the forward pass. recompute: the time of a step relative to one that recomputes nothing."""
    if given:
        return given, "TOKENS_PER_SECOND"
    if measured := _logged_speed(run_folder / METRICS):
        return measured, f"the median of {run_folder / METRICS}"
    peak = device.peak_tflops()
    tokens, trained, squares = map(round, (load.tokens, load.trained_tokens, load.sum_squared_lengths))
    operations = training_flops(architecture, tokens, trained, squares, frozen)
    operations += head_forward_flops(architecture, trained) if two_heads else 0.0
    operations /= max(tokens, 1)
    speed = ASSUMED_MFU * (peak or H100_TFLOPS) * 1e12 / operations * num_processes / recompute
    which = "this GPU's" if peak else "an H100's"
    again = f", {recompute:.2f} times as long with recomputation" if recompute > 1.0 else ""
    return speed, f"an assumed {ASSUMED_MFU:.0%} of {which} {peak or H100_TFLOPS:.0f} TFLOP/s{again}; set TOKENS_PER_SECOND"


def assumed_speed(architecture: Architecture, load: RowLoad, num_gpus: int, frozen: bool = False) -> float:
    """Tokens a second of H100s at the assumed share of their peak."""
    tokens, trained, squares = map(round, (load.tokens, load.trained_tokens, load.sum_squared_lengths))
    operations = training_flops(architecture, tokens, trained, squares, frozen) / max(tokens, 1)
    return ASSUMED_MFU * H100_TFLOPS * 1e12 / operations * num_gpus


def _logged_speed(path: Path) -> float | None:
    if not path.is_file():
        return None
    speeds = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            speeds.append(float(json.loads(line)["tokens_per_second"]))
        except (ValueError, KeyError, TypeError):
            continue  # a validation, or a line cut short
    return statistics.median(speeds) if speeds else None
