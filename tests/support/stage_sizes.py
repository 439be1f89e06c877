"""Worker: builds this process's part of a model and compares its number of weights with what memory.py says."""

import json
import sys

from megatron.sft.families.registry import read_architecture
from megatron.sft.model import process_groups
from megatron.sft.model.layout import Layout
from megatron.sft.planning.memory import stage_parameters
from megatron.sft.runtime import device


def main() -> None:
    device.prepare()
    import torch
    from megatron.core import parallel_state

    from megatron.sft.model.config import transformer_config
    from megatron.sft.model.gpt import build_model

    tensor, pipeline, expert = map(int, sys.argv[2:5])
    with open(sys.argv[1]) as file:
        architecture = read_architecture(json.load(file), sys.argv[1])
    layout = Layout(tensor, pipeline, 1, bool(architecture.moe) and tensor > 1, expert)
    with process_groups.parallel(layout, 0):
        model = build_model(architecture, layout, transformer_config(architecture, layout))
        built = sum(parameter.numel() for parameter in model.parameters())
        estimated = sum(stage_parameters(architecture, layout, parallel_state.get_pipeline_model_parallel_rank()))
        assert built == estimated, f"rank {torch.distributed.get_rank()}: built {built}, estimated {estimated}"


if __name__ == "__main__":
    main()
