"""The families by `model_type`, and the `Architecture` that a config.json describes.

To add a family:
1. a file with MODEL_TYPE, config.json's `model_type`, and `rules(architecture)`, its table of weights (often `decoder.table`);
2. whatever differs from the defaults in `_OPTIONAL`: names that config.json may have, defaults of transformers' class, pieces;
3. its name in `FAMILIES`, and a tiny random model in FAMILIES of the tests' tiny.py, which is compared with transformers'.
A field of config.json that the family does not list is refused by name, so read the model's own config.json.
"""

from types import ModuleType
from typing import Any

import torch

from megatron.sft.families import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.config_fields import check_fields
from megatron.sft.families.rope import read_rope
from megatron.sft.families.rules import Rule
from megatron.sft.runtime.errors import UserError

FAMILIES: dict[str, ModuleType] = {family.MODEL_TYPE: family for family in (llama, mistral, mixtral, qwen2, qwen3, qwen3_moe)}

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_OPTIONAL: dict[str, Any] = {
    "FIXED": {},  # field of config.json -> the only value that is supported
    "USED": set(),  # fields that the family reads itself
    "IMMATERIAL": set(),  # fields that do not change what the model computes
    "DEFAULTS": {},  # field -> the default of transformers' class, for fields that a config.json may lack
    "QKV_BIAS": False,
    "QK_NORM": False,
    "SLIDING_WINDOW": False,  # the field sliding_window has a meaning
    "ROPE_SCALING": set(),  # supported values of rope_type besides default
    "moe": None,  # function: config -> `MoEConfig`
}


def read_architecture(config: dict[str, Any], where: str) -> Architecture:
    """The `Architecture` of a model from the content of its config.json; `where` names the file in messages.

    A `UserError` for another model_type, and for every field or value that is unknown or not supported.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise UserError(f"{where}: model_type {model_type!r} is not supported: choose one of {', '.join(sorted(FAMILIES))}")
    facts = {name: getattr(family, name, default) for name, default in _OPTIONAL.items()}
    windowed = {"sliding_window"} if facts["SLIDING_WINDOW"] else set()
    check_fields(config, where, {*facts["USED"], *windowed}, facts["FIXED"], facts["IMMATERIAL"])
    try:
        return _read({**facts["DEFAULTS"], **config}, where, family.MODEL_TYPE, facts)
    except KeyError as error:
        raise UserError(f"{where}: the field {error.args[0]!r} is missing: is it the model's own config.json?") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: a field has a value of the wrong kind ({error}): take the model's own file") from None


def family_rules(architecture: Architecture) -> tuple[Rule, ...]:
    """The family's table of weights, with `{layer}` and `{expert}` in the names."""
    rules: tuple[Rule, ...] = FAMILIES[architecture.family].rules(architecture)
    return rules


def _read(config: dict[str, Any], where: str, family: str, facts: dict[str, Any]) -> Architecture:
    num_heads, hidden_size = int(config["num_attention_heads"]), int(config["hidden_size"])
    rope_theta, rope_scaling = read_rope(config, where, facts["ROPE_SCALING"])
    architecture = Architecture(
        family=family,
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=hidden_size,
        ffn_hidden_size=int(config["intermediate_size"]),
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=int(config.get("head_dim") or hidden_size // num_heads),
        vocab_size=int(config["vocab_size"]),
        max_positions=int(config["max_position_embeddings"]),
        norm_epsilon=float(config["rms_norm_eps"]),
        rope_theta=rope_theta,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=facts["QKV_BIAS"],
        torch_dtype=_dtype(config, where),
        rope_scaling=rope_scaling,
        sliding_window=_sliding_window(config) if facts["SLIDING_WINDOW"] else None,
        qk_norm=facts["QK_NORM"],
        moe=facts["moe"](config) if facts["moe"] else None,
    )
    _check_numbers(architecture, config, where)
    return architecture


def _check_numbers(architecture: Architecture, config: dict[str, Any], where: str) -> None:
    sizes = {name: value for name, value in architecture.__dict__.items() if type(value) is int}
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{where}: {name} is {value}: is it the model's own config.json?")
    if architecture.num_heads % architecture.num_kv_heads:
        raise UserError(
            f"{where}: {architecture.num_heads} attention heads cannot share {architecture.num_kv_heads} KV heads evenly"
        )
    layer_types = config.get("layer_types")
    wanted = "full_attention" if architecture.sliding_window is None else "sliding_attention"
    if layer_types is not None and any(kind != wanted for kind in layer_types):
        raise UserError(f"{where}: layer_types with other than {wanted!r} in all layers is not supported")
    moe = architecture.moe
    if moe and not 1 < moe.experts_per_token <= moe.num_experts:
        raise UserError(f"{where}: num_experts_per_tok={moe.experts_per_token} of {moe.num_experts} is not supported")


def _sliding_window(config: dict[str, Any]) -> int | None:
    window = config.get("sliding_window")
    # A window as long as the longest row is the same as none.
    return None if window is None or int(window) >= int(config["max_position_embeddings"]) else int(window)


def _dtype(config: dict[str, Any], where: str) -> torch.dtype:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"{where}: dtype {name!r} is not supported: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]
