"""What the GPUs of a run do in one step besides computing: communicate, and wait for each other; from a profile's kernels."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

# From its start to its end, in microseconds.
Interval = tuple[float, float]


@dataclass(frozen=True)
class Shares:
    """Shares of a step's time, the mean of all GPUs. communication: some kernel of NCCL runs. exposed: nothing else runs
    meanwhile; between_stages: of that, sending to and receiving from pipeline stages, which is mostly waiting for them.
    """

    communication: float
    exposed: float
    between_stages: float


def kernels_of(profiler: Any) -> list[tuple[str, Interval]]:
    """Name and time of every kernel of a profile."""
    events = (event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return [(event.name, (event.time_range.start, event.time_range.end)) for event in events]


def shares(kernels: list[tuple[str, Interval]]) -> Shares:
    """Of one GPU, whose step lasts from its first kernel to the end of its last."""
    if not kernels:
        return Shares(0.0, 0.0, 0.0)
    whole = max(end for _, (_, end) in kernels) - min(start for _, (start, _) in kernels)
    computing = [interval for name, interval in kernels if "nccl" not in name.lower()]
    talking = [interval for name, interval in kernels if "nccl" in name.lower()]
    stages = [interval for name, interval in kernels if "nccl" in name.lower() and "sendrecv" in name.lower()]
    busy = length(computing)
    # Sending between stages counts where neither a kernel nor another collective runs.
    others = [interval for interval in talking if interval not in stages]
    exposed = length([*computing, *talking]) - busy
    between = length([*computing, *talking]) - length([*computing, *others])
    return Shares(length(talking) / whole, exposed / whole, between / whole)


def length(intervals: Iterable[Interval]) -> float:
    """Microseconds in which at least one of the intervals runs."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def shares_of_all(kernels: list[tuple[str, Interval]]) -> Shares:
    """The mean of all processes' shares; every process calls it."""
    mine = torch.tensor(list(asdict(shares(kernels)).values()), device="cuda", dtype=torch.float64)
    torch.distributed.all_reduce(mine)
    return Shares(*(mine / torch.distributed.get_world_size()).tolist())
