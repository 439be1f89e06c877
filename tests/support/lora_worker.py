"""Trains adapters and checks after every step that each factor which several ranks hold is equal on them, bit for bit.

The arguments of megatron.sft.train.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state

from megatron.sft.model.lora.adapters import Adapter
from megatron.sft.runtime import device


def check_copies(engine: Any) -> None:
    """Replicated factors must be equal over their tensor-parallel groups, all factors over their data-parallel groups."""
    count = 0
    with engine.gathered_parameters():
        for adapter in adapters(engine):
            data = parallel_state.get_expert_data_parallel_group() if adapter.split.expert else _data_parallel_group()
            for part in adapter.parts():
                for group in [data, *[adapter.split.group] * part.replicated]:
                    if group.size() > 1:
                        copies = [torch.empty_like(part.values) for _ in range(group.size())]
                        torch.distributed.all_gather(copies, part.values.contiguous(), group=group)
                        assert all(torch.equal(copies[0], copy) for copy in copies), part.name
                        count += 1
    several = parallel_state.get_tensor_model_parallel_world_size() > 1 or _data_parallel_group().size() > 1
    assert bool(count) == several


def adapters(engine: Any) -> Iterator[Adapter]:
    for chunk in engine.chunks:
        yield from (module for module in chunk.modules() if isinstance(module, Adapter))


def _data_parallel_group() -> Any:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def main() -> int:
    device.prepare()
    from megatron.sft.train import main as train
    from megatron.sft.training.engine import Engine

    step = Engine.train_step

    def checked(engine: Any, batches: Any) -> Any:
        result = step(engine, batches)
        check_copies(engine)
        return result

    Engine.train_step = checked  # type: ignore[method-assign]
    return train(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
