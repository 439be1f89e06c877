"""Trains adapters and checks after every step that each factor which several ranks hold is equal on them, bit for bit.

The arguments of megatron.sft.train.
"""

import sys
from typing import Any

import torch
from megatron.core import parallel_state

from megatron.sft.model.adapters import Adapter
from megatron.sft.runtime import device


def check_copies(engine: Any) -> int:
    """The number of replicated factors, which must be equal over their tensor-parallel groups."""
    count = 0
    with engine.gathered_parameters():
        for chunk in engine.chunks:
            for adapter in (module for module in chunk.modules() if isinstance(module, Adapter)):
                for part in adapter.parts():
                    if not part.replicated or adapter.split.size == 1:
                        continue
                    copies = [torch.empty_like(part.values) for _ in range(adapter.split.size)]
                    torch.distributed.all_gather(copies, part.values.contiguous(), group=adapter.split.group)
                    assert all(torch.equal(copies[0], copy) for copy in copies), part.name
                    count += 1
    return count


def main() -> int:
    device.prepare()
    from megatron.sft.train import main as train
    from megatron.sft.training.engine import Engine

    step = Engine.train_step

    def checked(engine: Any, batches: Any) -> Any:
        result = step(engine, batches)
        count = check_copies(engine)
        assert bool(count) == (parallel_state.get_tensor_model_parallel_world_size() > 1) or "--no-copies" in sys.argv
        return result

    Engine.train_step = checked  # type: ignore[method-assign]
    return train(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
