"""Processes: joining them into megatron-core's parallel groups, and starting more of them from a single one."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

from megatron.sft import device
from megatron.sft.errors import UserError
from megatron.sft.layout import Layout


@contextlib.contextmanager
def parallel(layout: Layout, seed: int = 1234, timeout_minutes: float = 10.0) -> Iterator[None]:
    """Join this process to its group with the parallel sizes of `layout`; seeds the generators; leaves at the end."""
    with device.process_group(timeout_minutes), model_parallel(layout, seed):
        yield


@contextlib.contextmanager
def model_parallel(layout: Layout, seed: int = 1234) -> Iterator[None]:
    """megatron-core's groups with the parallel sizes of `layout`, among the processes that have joined."""
    import torch
    from megatron.core import parallel_state

    layout.data_parallel(torch.distributed.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context_parallel,
        expert_model_parallel_size=layout.expert_parallel,
        expert_tensor_parallel_size=layout.expert_tensor_parallel,
        create_gloo_process_groups=False,
    )
    device.seed_everything(seed)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def is_first() -> bool:
    """True on the process that prints and writes for all."""
    return int(os.environ.get("RANK", "0")) == 0


def say(message: str) -> None:
    """Print a line from the first process only."""
    if is_first():
        print(message, flush=True)


def run_module(num_processes: int, module: str, arguments: Sequence[str]) -> None:
    """Run `python -m megatron.sft.<module>` in `num_processes` processes of this machine, on CPU, and wait for them.

    A process that fails makes this a `UserError`; its own message was printed before.
    """
    environment = {**os.environ, "MEGATRON_SFT_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    command += ["-m", f"megatron.sft.{module}", *arguments]
    result = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
    if result.returncode:
        reasons = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        raise UserError(reasons[0].removeprefix("error: ") if reasons else f"{module} failed:\n{result.stderr[-3000:]}")
