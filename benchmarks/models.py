"""The model that a benchmark measures: one by name, or some layers and experts of it where the whole does not fit a GPU."""

import argparse
from dataclasses import replace
from typing import Any

from megatron.sft.families.architecture import Architecture
from megatron.sft.hf.published_configs import find_architecture
from megatron.sft.runtime.errors import UserError


def cut_architecture(arguments: argparse.Namespace) -> Architecture:
    """The architecture of --model, cut to --layers; with --experts to that many in a layer, and to layers that have experts."""
    architecture, _ = find_architecture(arguments.model)
    layers, moe = architecture.layers, architecture.moe
    if arguments.experts:
        if moe is None or not moe.experts_per_token <= arguments.experts <= moe.num_experts:
            raise UserError(f"--experts {arguments.experts}: {arguments.model} has {moe.num_experts if moe else 'none'}")
        layers, moe = tuple(layer for layer in layers if layer.experts), replace(moe, num_experts=arguments.experts)
    layers = layers[: arguments.layers or len(layers)]
    return replace(architecture, num_layers=len(layers), layers=layers, moe=moe)


def cut_config(config: Any, num_layers: int, num_experts: int) -> None:
    """Cut a configuration of transformers in the same way."""
    if num_layers:
        config.num_hidden_layers = num_layers
        for name in ("layer_types", "mlp_layer_types"):
            if getattr(config, name, None):
                setattr(config, name, getattr(config, name)[:num_layers])
    if not num_experts:
        return
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if hasattr(config, name):
            setattr(config, name, num_experts)
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = 0
    if getattr(config, "mlp_layer_types", None):
        config.mlp_layer_types = ["sparse"] * config.num_hidden_layers
