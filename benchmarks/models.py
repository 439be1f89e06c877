"""The model that a benchmark measures: one by name, or its first layers where the whole does not fit a GPU."""

import argparse
from dataclasses import replace

from megatron.sft.families.architecture import Architecture
from megatron.sft.hf.published_configs import find_architecture


def cut_architecture(arguments: argparse.Namespace) -> Architecture:
    """The architecture of --model, cut to --layers."""
    architecture, _ = find_architecture(arguments.model)
    count = arguments.layers or architecture.num_layers
    return replace(architecture, num_layers=count, layers=architecture.layers[:count])
