"""The families by `model_type`, and the `Architecture` that a config.json describes.

To add a family:
1. a file in the room `tables` with MODEL_TYPES, config.json's `model_type`s, and whatever differs from `_OPTIONAL`;
2. its name in `TABLES`, and a tiny random model in the tests' tiny_families.py, which is compared with transformers'.
A field of config.json that the family does not list is refused by name, so read the model's own config.json.
"""

from collections.abc import Collection, Iterable
from types import ModuleType
from typing import Any

import torch

from megatron.sft.families import decoder
from megatron.sft.families.architecture import GATED_DELTA_NET, Architecture, DeltaNetConfig, LatentConfig, Layer, MoEConfig
from megatron.sft.families.config_fields import check_fields, flat_config, text_fields
from megatron.sft.families.layers import read_layers
from megatron.sft.families.missing import what_is_missing
from megatron.sft.families.rope import rope_parameters
from megatron.sft.families.rules import Rule
from megatron.sft.runtime.errors import UserError
from megatron.sft.tables import (
    ernie4_5,
    gemma3,
    glm4,
    granite,
    hunyuan_v1_dense,
    llama,
    mistral,
    olmo,
    phi3,
    qwen2,
    qwen3,
    qwen3_5,
    seed_oss,
    smollm3,
)
from megatron.sft.tables.mixtures import (
    deepseek,
    ernie4_5_moe,
    glm4_moe,
    gpt_oss,
    minimax_m2,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)

TABLES: tuple[ModuleType, ...] = (
    llama, mistral, mixtral, qwen2, qwen2_moe, qwen3, qwen3_moe, qwen3_5, gemma3, phi3, glm4, glm4_moe, olmo, seed_oss,
    olmoe, smollm3, granite, ernie4_5, ernie4_5_moe, minimax_m2, gpt_oss, hunyuan_v1_dense, deepseek,
)  # fmt: skip
FAMILIES: dict[str, ModuleType] = {model_type: table for table in TABLES for model_type in table.MODEL_TYPES}
# model_type of a model that has other parts besides the text model -> the text model's, unless its own text_config says it.
WRAPPERS: dict[str, str] = {name: table.MODEL_TYPES[0] for table in TABLES for name in getattr(table, "WRAPPERS", ())}

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_OPTIONAL: dict[str, Any] = {
    "FIXED": {},  # field of config.json -> the only value that is supported
    "USED": set(),  # fields that the family reads itself
    "IMMATERIAL": set(),  # fields that do not change what the model computes
    "DEFAULTS": {},  # field -> the default of transformers' class, for fields that a config.json may lack
    "WRAPPERS": (),  # model_types of models that hold such a text model in text_config
    "CARRIED": (),  # prefixes of the tensors that are not trained, only carried to the export
    "NAMES": {},  # modules with other names than in `decoder.NAMES`
    "PIECES": {},  # fields of `Architecture` that all models of the family have
    "pieces": None,  # function: config -> fields of `Architecture` that config.json decides
    "SLIDING_WINDOW": False,  # the field sliding_window has a meaning
    "ROPE_THETA": 10000.0,  # the base where config.json has none
    "PARTIAL_ROTARY": None,  # the rotated share of a head where config.json has none; None: the family rotates all of it
    "ROPE_FIELDS": (),  # RoPE parameters that other families do not know
    "ROPE_ALIASES": {},  # old names of rope_type
    "layer_types": None,  # function: config -> the type of each layer, where config.json does not say
    "ropes": None,  # function: config -> RoPE parameters by type of layer
    "rotated": None,  # function: config -> whether each layer rotates queries and keys
    "experts": None,  # function: config -> whether each layer has experts; else as `layers._experts` has it
    "moe": None,  # function: config -> fields of `MoEConfig`; empty for a model without experts
    "delta_net": None,  # function: config -> fields of `DeltaNetConfig`
    "latent": None,  # function: config -> fields of `LatentConfig`
    "OF_TYPE": {},  # model_type -> what of the above is otherwise for it, where a file has several
}


def read_table(family: str) -> dict[str, Any]:
    """What the family's file defines, with the defaults of `_OPTIONAL`."""
    table = {name: getattr(FAMILIES[family], name, default) for name, default in _OPTIONAL.items()}
    return {**table, **table["OF_TYPE"].get(family, {})}


def read_architecture(config: dict[str, Any], where: str) -> Architecture:
    """The `Architecture` of a model from the content of its config.json; `where` names the file in messages.

    A `UserError` for another model_type, and for every field or value that is unknown or not supported.
    """
    wrapper = WRAPPERS.get(str(config.get("model_type")))
    text = flat_config(config, wrapper, where) if wrapper else config
    model_type = str(text.get("model_type"))
    if model_type not in FAMILIES:
        names = ", ".join(sorted({*FAMILIES, *WRAPPERS}))
        raise UserError(
            f"{where}: model_type {text.get('model_type')!r} is not supported: {what_is_missing(config)}; choose one of {names}"
        )
    table = read_table(model_type)
    windowed = {"sliding_window"} if table["SLIDING_WINDOW"] else set()
    partial = {"partial_rotary_factor"} if table["PARTIAL_ROTARY"] is not None else set()
    check_fields(text, where, {*table["USED"], *windowed, *partial}, table["FIXED"], table["IMMATERIAL"])
    try:
        return _read({**table["DEFAULTS"], **text}, where, model_type, table)
    except KeyError as error:
        raise UserError(f"{where}: the field {error.args[0]!r} is missing: is it the model's own config.json?") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: a field has a value of the wrong kind ({error}): take the model's own file") from None


def carried_names(config: dict[str, Any], names: Iterable[str]) -> set[str]:
    """Those of a folder's tensors that are not trained, but carried from source to export: other parts of the model."""
    prefixes: tuple[str, ...] = read_table(_text_type(config))["CARRIED"]
    text = text_fields(config)
    # Heads that predict further tokens, as layers after the last one.
    further = range(int(text.get("num_nextn_predict_layers") or 0))
    prefixes += tuple(f"model.layers.{int(text['num_hidden_layers']) + number}." for number in further)
    return {name for name in names if name.startswith(prefixes)}


def text_prefixes(config: dict[str, Any], names: Collection[str]) -> dict[str, str]:
    """Where the text model is one part of several: prefix in a family's table -> prefix on disk; {} where they are the same.

    transformers 5 writes the first of these forms, older versions the second.
    """
    forms = ({"model.": "model.language_model."}, {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."})
    if str(config.get("model_type")) in WRAPPERS:
        for form in forms:
            if f"{form['model.']}embed_tokens.weight" in names:
                return form
    return {}


def config_notes(config: dict[str, Any]) -> list[str]:
    """What of a config.json is not used here, for the user: a dropout, and RoPE parameters that transformers does not read."""
    text = text_fields(config)
    found = [name for name in ("attention_dropout", "residual_dropout") if text.get(name)]
    notes = [f"config.json: {name}={text[name]} is not used: fine-tuning here has no dropout" for name in found]
    parameters = rope_parameters(text)
    factors = [name for name in ("attn_factor",) if parameters.get(name) is not None]
    notes += [f"config.json: the RoPE parameter {name}={parameters[name]} is not used, as in transformers" for name in factors]
    if config.get("auto_map"):
        notes.append(
            "config.json: auto_map names Python code in the folder, which is not run: transformers' own model is meant"
        )
    return notes


def _text_type(config: dict[str, Any]) -> str:
    """The text model's model_type."""
    wrapper = WRAPPERS.get(str(config.get("model_type")))
    return str(text_fields(config).get("model_type", wrapper) if wrapper else config.get("model_type"))


def family_rules(architecture: Architecture) -> tuple[Rule, ...]:
    """The whole table of weights, with `{layer}` and `{expert}` in the names: outside layers, then of each kind of layer."""
    of_layers = [rule for layer in dict.fromkeys(architecture.layers) for rule in layer_rules(architecture, layer)]
    return tuple(dict.fromkeys([*decoder.outer(architecture), *of_layers]))


def layer_rules(architecture: Architecture, layer: Layer) -> tuple[Rule, ...]:
    """The table of weights of such a layer."""
    return decoder.of_layer(architecture, layer, module_names(architecture.family))


def module_names(family: str) -> dict[str, str]:
    """`decoder.NAMES` as the family has them."""
    return {**decoder.NAMES, **read_table(family)["NAMES"]}


def _read(config: dict[str, Any], where: str, family: str, table: dict[str, Any]) -> Architecture:
    num_heads, hidden_size = int(config["num_attention_heads"]), int(config["hidden_size"])
    layers = read_layers(config, table, where)
    mixture = table["moe"](config) if table["moe"] else {}
    # `dynamic` scaling continues beyond the positions that config.json names.
    stretches = [layer.rope.scaling.factor for layer in layers if layer.rope and layer.rope.scaling]
    dynamic = any(layer.rope.scaling.kind == "dynamic" for layer in layers if layer.rope and layer.rope.scaling)
    latent = LatentConfig(**table["latent"](config)) if table["latent"] else None
    architecture = Architecture(
        family=family,
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=hidden_size,
        # A model may have no dense layer, and no field for its width.
        ffn_hidden_size=int(
            config["intermediate_size" if "intermediate_size" in config or not mixture else "moe_intermediate_size"]
        ),
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=latent.head_dim if latent else int(config.get("head_dim") or hidden_size // num_heads),
        vocab_size=int(config["vocab_size"]),
        max_positions=int(int(config["max_position_embeddings"]) * (max(stretches) if dynamic else 1)),
        norm_epsilon=float(config["rms_norm_eps"]),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        torch_dtype=_dtype(config, where),
        layers=layers,
        moe=MoEConfig(**mixture) if mixture else None,
        delta_net=DeltaNetConfig(**table["delta_net"](config)) if table["delta_net"] else None,
        latent=latent,
        **{**table["PIECES"], **(table["pieces"](config) if table["pieces"] else {})},
    )
    _check_numbers(architecture, where)
    return architecture


def _check_numbers(architecture: Architecture, where: str) -> None:
    sizes = {name: value for name, value in architecture.__dict__.items() if type(value) is int}
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{where}: {name} is {value}: is it the model's own config.json?")
    if architecture.num_heads % architecture.num_kv_heads:
        raise UserError(
            f"{where}: {architecture.num_heads} attention heads cannot share {architecture.num_kv_heads} KV heads evenly"
        )
    if architecture.moe:
        _check_mixture(architecture.moe, where)
    delta_net = architecture.delta_net
    if delta_net and delta_net.num_value_heads % delta_net.num_key_heads:
        raise UserError(
            f"{where}: {delta_net.num_value_heads} value heads cannot share {delta_net.num_key_heads} key heads evenly"
        )
    for name in ("embedding_scale", "residual_scale", "logit_scale", "attention_scale", "logit_cap"):
        scale = getattr(architecture, name)
        if scale is not None and not scale > 0:
            raise UserError(f"{where}: {name} is {scale}: is it the model's own config.json?")
    if architecture.interleaved_rope and (len(architecture.ropes) > 1 or architecture.query_key_norm):
        raise UserError(f"{where}: interleaved RoPE with several bases or normed queries is not supported")
    if architecture.latent and architecture.num_kv_heads != architecture.num_heads:
        raise UserError(
            f"{where}: num_key_value_heads={architecture.num_kv_heads} with latent attention of {architecture.num_heads} heads "
            "is not supported: each head has its own keys and values"
        )
    if all(layer.mixer == GATED_DELTA_NET for layer in architecture.layers):
        raise UserError(f"{where}: no layer has attention: is it the model's own config.json?")


def _check_mixture(moe: MoEConfig, where: str) -> None:
    """The numbers of experts, groups and those chosen of them must fit together."""
    groups, size = moe.num_groups, moe.num_experts // max(moe.num_groups, 1)
    if groups < 1 or moe.num_experts % groups or not 1 <= moe.chosen_groups <= groups:
        raise UserError(f"{where}: {moe.chosen_groups} of {groups} groups of {moe.num_experts} experts are not possible")
    if not 1 <= moe.experts_per_token <= moe.chosen_groups * size or moe.ffn_hidden_size < 1 or moe.shared_width < 0:
        raise UserError(
            f"{where}: {moe.experts_per_token} experts a token of {moe.chosen_groups * size}, of width {moe.ffn_hidden_size}, "
            f"and shared ones of width {moe.shared_width} are not possible: is it the model's own config.json?"
        )
    if groups > 1 and moe.group_score == "two best" and size < 2:
        raise UserError(f"{where}: groups of {size} expert have no two best: is it the model's own config.json?")


def _dtype(config: dict[str, Any], where: str) -> torch.dtype:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"{where}: dtype {name!r} is not supported: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]
