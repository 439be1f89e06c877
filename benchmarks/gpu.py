"""What the benchmarks ask of a GPU: the time of some work, the speed of a matrix product, the most memory used."""

import statistics
from collections.abc import Callable
from typing import Any

import torch


def gemm_tflops(size: int = 8192) -> float:
    """TFLOP/s of a `size` x `size` x `size` bf16 product of random numbers: what this card can do at most."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = time_on_gpu(lambda: a @ b, 20)
    return 2 * size**3 / seconds / 1e12


def time_on_gpu(work: Callable[[], Any], repeats: int) -> float:
    """Median seconds of `work` between events on the GPU, after three runs that do not count."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats + 3)]
    for start, end in pairs:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs[3:]) / 1000


def peak_bytes() -> list[float]:
    """The most bytes so far: of tensors, and of what torch's allocator held for them."""
    return [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
