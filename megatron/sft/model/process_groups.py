"""Joining this process to torch.distributed and to megatron-core's parallel groups."""

import contextlib
from collections.abc import Iterator

from megatron.sft.model.layout import Layout
from megatron.sft.runtime import device


@contextlib.contextmanager
def parallel(layout: Layout, seed: int = 1234, timeout_minutes: float = 10.0) -> Iterator[None]:
    """Join the default process group and the parallel groups of `layout`, seed the generators, and leave both at the end."""
    with device.process_group(timeout_minutes), model_parallel(layout, seed):
        yield


@contextlib.contextmanager
def model_parallel(layout: Layout, seed: int = 1234) -> Iterator[None]:
    """megatron-core's parallel groups of `layout` among the processes that have joined the default group.

    A `UserError` if their number does not fit the layout.
    """
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
