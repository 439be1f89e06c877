"""Model families: what config.json says in terms of one `Shape`, and the table of weights, read in both directions.

To add a family: a file with MODEL_TYPE, FIXED, QKV_BIAS and rules(), and its name in `FAMILIES`.
"""

from types import ModuleType
from typing import Any

import torch

from megatron.sft.errors import UserError
from megatron.sft.families import llama, qwen2
from megatron.sft.families.rules import Rule, Shape

FAMILIES: dict[str, ModuleType] = {family.MODEL_TYPE: family for family in (llama, qwen2)}

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def read_shape(config: dict[str, Any], where: str) -> Shape:
    """The `Shape` of a model from the content of its config.json; `where` names the file in messages.

    Refused by name: another model_type, a field whose value this project does not build, RoPE scaling.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise UserError(
            f"{where}: model_type {model_type!r} is not supported: choose one of {', '.join(sorted(FAMILIES))}"
        )
    for field, wanted in family.FIXED.items():
        if config.get(field, wanted) != wanted:
            raise UserError(f"{where}: {field}={config[field]!r} is not supported for {model_type} (only {wanted!r})")
    try:
        num_heads = int(config["num_attention_heads"])
        hidden_size = int(config["hidden_size"])
        return Shape(
            family=family.MODEL_TYPE,
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden_size,
            ffn_hidden_size=int(config["intermediate_size"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or hidden_size // num_heads),
            vocab_size=int(config["vocab_size"]),
            max_positions=int(config["max_position_embeddings"]),
            norm_epsilon=float(config["rms_norm_eps"]),
            rope_theta=_rope_theta(config, where),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family.QKV_BIAS,
            torch_dtype=_dtype(config, where),
        )
    except KeyError as error:
        raise UserError(
            f"{where}: the field {error.args[0]!r} is missing: is it the model's own config.json?"
        ) from None


def rules_of(shape: Shape) -> tuple[Rule, ...]:
    """The family's table of weights, `{}` standing for the layer's number."""
    rules: tuple[Rule, ...] = FAMILIES[shape.family].rules(shape)
    return rules


def _rope_theta(config: dict[str, Any], where: str) -> float:
    # transformers 5 writes rope_parameters, older ones rope_theta beside an optional rope_scaling.
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise UserError(f"{where}: RoPE scaling of type {kind!r} is not supported")
    theta = parameters.get("rope_theta", config.get("rope_theta"))
    # The default of transformers' LlamaConfig, which configs that predate the field rely on.
    return 10000.0 if theta is None else float(theta)


def _dtype(config: dict[str, Any], where: str) -> torch.dtype:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"{where}: dtype {name!r} is not supported: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]
