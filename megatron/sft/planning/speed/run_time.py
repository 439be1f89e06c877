"""How long a run will take: from a given speed, the speed of an earlier part of it, or an estimate."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.sft.data.tokenized import MODE_FIRST, Index, TokenizedRows, data_file, read_index
from megatron.sft.reporting.curves import METRICS
from megatron.sft.runtime import device

# Dense bf16 peak of an H100 or H200, of which step_time.py has measurements.
H100_TFLOPS = 989.4
ESTIMATED = "estimated for"


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


def tokens_per_second(given: float, run_folder: Path, estimated: float) -> tuple[float, str]:
    """Tokens a second of all processes together, and the source of that figure in words. estimated: without any other, what
    H100s would do."""
    if given:
        return given, "TOKENS_PER_SECOND"
    if measured := _logged_speed(run_folder / METRICS):
        return measured, f"the median of {run_folder / METRICS}"
    peak = device.peak_tflops()
    if not peak:
        return estimated, f"{ESTIMATED} H100s; set TOKENS_PER_SECOND"
    return estimated * peak / H100_TFLOPS, f"{ESTIMATED} this GPU's {peak:.0f} TFLOP/s; set TOKENS_PER_SECOND"


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
