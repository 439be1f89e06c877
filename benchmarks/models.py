"""The model that a benchmark measures: one by name, or a part of it where the whole does not fit a GPU."""

import argparse
import copy
from pathlib import Path
from typing import Any

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.config_fields import text_fields
from megatron.sft.families.registry import read_architecture
from megatron.sft.hf.block_scales import unquantised_config
from megatron.sft.hf.published_configs import published_configs
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import read_json

# Fields of config.json: numbers of experts, lists with an entry a layer, and numbers of layers.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_BY_LAYER = ("layer_types", "no_rope_layers", "attn_type_list")
_FIRST_WITH_EXPERTS = ("first_k_dense_replace", "moe_layer_start_index")


def cut_architecture(arguments: argparse.Namespace) -> Architecture:
    """The architecture of --model, cut as `cut_config` does."""
    return read_architecture(cut_config(arguments), arguments.model)


def cut_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """config.json of --model without its first --skip-layers layers, with --layers of the others, and --experts a layer."""
    config = _whole_config(arguments.model)
    text = text_fields(config)
    skipped, total = arguments.skip_layers, int(text["num_hidden_layers"])
    count = arguments.layers or total - skipped
    if not 0 < count <= total - skipped:
        raise UserError(f"--layers {count} after --skip-layers {skipped}: {arguments.model} has {total} layers")
    text["num_hidden_layers"] = count
    text |= {name: text[name][skipped : skipped + count] for name in _BY_LAYER if text.get(name)}
    text |= {name: max(0, int(text[name]) - skipped) for name in _FIRST_WITH_EXPERTS if text.get(name)}
    if int(text.get("moe_layer_end_index") or -1) > 0:
        text["moe_layer_end_index"] = min(int(text["moe_layer_end_index"]) - skipped, count - 1)
    if text.get("mlp_only_layers"):
        text["mlp_only_layers"] = [layer - skipped for layer in text["mlp_only_layers"] if layer >= skipped]
    if arguments.experts:
        fields = [name for name in _EXPERTS if name in text]
        if not fields:
            raise UserError(f"--experts {arguments.experts}: {arguments.model} has none")
        text |= dict.fromkeys(fields, arguments.experts)
    return config


def _whole_config(name: str) -> dict[str, Any]:
    """config.json of a folder, a file, or a name in assets/models.json, without a quantization entry."""
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    known = published_configs()
    if not path.is_file() and name not in known:
        raise UserError(f"--model {name} is neither a folder with a config.json nor one of {', '.join(known)}")
    config = read_json(path, "model configuration", "take the model's own file") if path.is_file() else known[name]
    return unquantised_config(copy.deepcopy(config), name)
