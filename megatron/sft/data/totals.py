"""What a manifest says of the tokenised data as a whole: counts that add up, how full the rows are, lengths."""

from typing import Any

import numpy as np

from megatron.sft.data.packing import Packing


def totals_of(
    lengths: np.ndarray, num_trained: int, max_token_id: int, packing: Packing, row_length: int
) -> dict[str, Any]:
    """lengths: [conversations], in tokens. `row_units` counts the units of rows by their number of rows."""
    num_tokens = int(lengths.sum())
    facts = {
        "length": row_length,
        "rows": packing.num_rows,
        "conversations": len(lengths),
        "tokens": num_tokens,
        "trained_tokens": num_trained,
        "fill": num_tokens / (packing.num_rows * row_length),
        "max_token_id": max_token_id,
        "conversation_lengths": length_statistics(lengths) | {"histogram": length_histogram(lengths)},
    }
    if packing.joined.any():
        sizes, counts = np.unique(np.bincount(np.cumsum(~packing.joined) - 1), return_counts=True)
        facts["row_units"] = {str(size): count for size, count in zip(sizes.tolist(), counts.tolist(), strict=True)}
    return facts


def length_statistics(lengths: np.ndarray) -> dict[str, Any]:
    """Of at least one length; the percentiles are lengths that occur."""
    shortest, median, p90, p99, longest = np.percentile(lengths, [0, 50, 90, 99, 100], method="lower").tolist()
    mean = float(lengths.mean())
    return {"mean": mean, "shortest": shortest, "median": median, "p90": p90, "p99": p99, "longest": longest}


def length_histogram(lengths: np.ndarray) -> list[list[int]]:
    """[[up_to, count], …]: how many lengths are up to `up_to` and above the one before; four steps a doubling."""
    steps = np.unique(np.round(2 ** (np.arange(1, 4 * 40) / 4)).astype(np.int64))
    counts = np.bincount(np.searchsorted(steps, lengths))
    first = int(np.flatnonzero(counts)[0])
    return [[int(steps[index]), int(count)] for index, count in enumerate(counts.tolist()) if index >= first]
