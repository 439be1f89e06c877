"""The cases that `benchmarks.memory` measures by name: options of benchmark_train, a case a line, the most telling first."""

import argparse
import shlex

from benchmarks import train

# For `plan` no other phase: forward and backward again.
SEARCH = "looking for a bad row"
# The status of a process that leaves the rest to another.
AGAIN = 4
_SHORT = {"--steps": "2", "--warm-up": "1"}

_DENSE = "--model Qwen/Qwen2.5-1.5B-Instruct --micro-batches 2"
_LARGER = "--model Qwen/Qwen2.5-3B-Instruct --micro-batches 2"
_ADAPTERS = "--model Qwen/Qwen2.5-7B-Instruct --lora-rank 16 --micro-batches 2"
_MIXTURE = "--model Qwen/Qwen3-30B-A3B --layers 4 --micro-batches 2"

_ONE_GPU = f"""
{_DENSE}
{_DENSE} --recompute selective
{_DENSE} --recompute-layers 7
{_DENSE} --recompute-layers 14
{_DENSE} --recompute-layers 21
{_DENSE} --recompute full
{_DENSE} --optimizer-precision bf16
{_DENSE} --optimizer-precision bf16 --recompute selective
{_DENSE} --optimizer-precision bf16 --recompute full
{_DENSE} --precision fp8
{_DENSE} --precision fp8 --recompute selective
{_DENSE} --precision fp8 --recompute-layers 14
{_LARGER} --row-length 4096 --recompute selective
{_LARGER} --row-length 4096 --recompute selective --optimizer-precision bf16
{_LARGER} --row-length 4096 --recompute selective --optimizer-precision 8bit
{_LARGER} --row-length 8192 --recompute-layers 18 --optimizer-precision bf16
{_LARGER} --row-length 8192 --recompute full --optimizer-precision bf16
{_LARGER} --row-length 8192 --recompute selective --optimizer-precision bf16 --precision fp8
{_MIXTURE} --recompute selective --optimizer-precision bf16
{_MIXTURE} --recompute-layers 2 --optimizer-precision bf16
{_MIXTURE} --recompute selective
{_ADAPTERS} --row-length 4096 --recompute selective
{_ADAPTERS} --row-length 8192 --recompute-layers 14
{_ADAPTERS} --row-length 16384 --recompute full
{_ADAPTERS} --row-length 8192 --recompute selective --precision fp8
{_DENSE} --recompute selective --optimizer-offload 1
{_DENSE} --recompute selective --optimizer-offload 0.5
{_DENSE} --precision fp8 --fp8-recipe delayed
{_DENSE} --precision fp8 --recompute full
{_DENSE} --precision fp16 --recompute selective
{_DENSE} --precision fp32 --row-length 4096
{_MIXTURE}
{_LARGER} --row-length 1024 --recompute full --optimizer-precision bf16
"""
_7B = "--model Qwen/Qwen2.5-7B-Instruct --micro-batches 2 --optimizer-precision bf16 --recompute selective"
_TWO_GPUS = f"""
{_7B} --tensor-parallel 2 --row-length 8192
{_7B} --tensor-parallel 2 --row-length 16384
{_7B} --tensor-parallel 2 --row-length 8192 --precision fp8
{_7B} --tensor-parallel 2 --row-length 16384 --precision fp8
{_7B} --pipeline-parallel 2 --row-length 8192
{_7B} --pipeline-parallel 2 --row-length 8192 --recompute-layers 7
{_MIXTURE} --expert-parallel 2 --recompute selective --optimizer-precision bf16
"""
# Of any machine, to see that everything runs: the model is a folder of the test's.
_TINY = """
--row-length 1024 --micro-batches 1
--row-length 1024 --micro-batches 1 --recompute selective
--row-length 1024 --micro-batches 1 --recompute-layers 2
--row-length 1024 --micro-batches 1 --recompute full
--row-length 1024 --micro-batches 1 --optimizer-precision bf16
--row-length 1024 --micro-batches 1 --precision fp8
"""
SUITES = {"one-gpu": _ONE_GPU, "two-gpus": _TWO_GPUS, "tiny": _TINY}


def suite(name: str) -> list[str]:
    """The cases of a suite."""
    return SUITES[name].strip().splitlines()


def case_arguments(case: str) -> argparse.Namespace:
    """The case's options; few steps unless it says how many."""
    words = shlex.split(case)
    for name, value in _SHORT.items():
        words += [] if name in words else [name, value]
    return train.parse([*words, "--stack", "ours"])
