"""What differs from layer to layer, from config.json: windows, rotation, what mixes tokens, experts."""

from typing import Any

from megatron.sft.families.architecture import ATTENTION, GATED_DELTA_NET, LATENT_ATTENTION, Layer, Rope
from megatron.sft.families.rope import read_rope, rope_parameters
from megatron.sft.runtime.errors import UserError

FULL, WINDOW, LINEAR = "full_attention", "sliding_attention", "linear_attention"


def read_layers(config: dict[str, Any], table: dict[str, Any], where: str) -> tuple[Layer, ...]:
    """A `Layer` for each layer. `table`: what the family's file defines, with defaults (`registry.read_table`)."""
    num_layers = int(config["num_hidden_layers"])
    window = _window(config) if table["SLIDING_WINDOW"] else None
    types = config.get("layer_types") or (table["layer_types"](config) if table["layer_types"] else None)
    if types is None:
        types = [FULL if window is None else WINDOW] * num_layers
    _check_types(config, table, list(types), where)
    ropes = _ropes(config, table, set(types), where)
    rotated = table["rotated"](config) if table["rotated"] else [True] * num_layers
    experts = table["experts"](config) if table["experts"] else _experts(config, table, where)
    attention = LATENT_ATTENTION if table["latent"] else ATTENTION
    return tuple(
        Layer(
            mixer=GATED_DELTA_NET if types[number] == LINEAR else attention,
            window=window if types[number] == WINDOW else None,
            rope=ropes[types[number]] if rotated[number] and types[number] != LINEAR else None,
            experts=bool(experts[number]),
        )
        for number in range(num_layers)
    )


def _experts(config: dict[str, Any], table: dict[str, Any], where: str) -> list[bool]:
    """Whether each layer has experts: all of a mixture do, but for `mlp_only_layers` and those between every
    `decoder_sparse_step`th one, in families that have the fields."""
    asked, dense = config.get("decoder_sparse_step"), config.get("mlp_only_layers") or []
    step = 1 if asked is None else int(asked)
    if step < 1:
        raise UserError(f"{where}: decoder_sparse_step={step} is not possible: it starts at 1")
    is_mixture = bool(table["moe"] and table["moe"](config))
    return [is_mixture and (layer + 1) % step == 0 and layer not in dense for layer in range(int(config["num_hidden_layers"]))]


def _check_types(config: dict[str, Any], table: dict[str, Any], types: list[str], where: str) -> None:
    if len(types) != int(config["num_hidden_layers"]):
        raise UserError(
            f"{where}: layer_types names {len(types)} layers, num_hidden_layers is {config['num_hidden_layers']}: "
            "take the model's own file"
        )
    possible = {FULL} | ({WINDOW} if table["SLIDING_WINDOW"] else set()) | ({LINEAR} if table["delta_net"] else set())
    for kind in types:
        if kind not in possible:
            wanted = " or ".join(map(repr, sorted(possible)))
            raise UserError(f"{where}: layer_types with other than {wanted} ({kind!r}) is not supported")
    # Families whose layers are all alike do not read the field: it must not say something else.
    alike = table["SLIDING_WINDOW"] and not table["layer_types"] and len(set(types)) > 1
    if alike or (WINDOW in types and config.get("sliding_window") is None):
        raise UserError(f"{where}: layer_types and sliding_window={config.get('sliding_window')!r} do not fit together")


def _window(config: dict[str, Any]) -> int | None:
    window = config.get("sliding_window")
    # A window as long as the longest row is the same as none.
    return None if window is None or int(window) >= int(config["max_position_embeddings"]) else int(window)


def _ropes(config: dict[str, Any], table: dict[str, Any], types: set[str], where: str) -> dict[str, Rope]:
    """The rotation of each type of layer."""
    parameters = rope_parameters(config)
    by_type: dict[str, Any] = table["ropes"](config) if table["ropes"] else {}
    if not by_type:
        nested = parameters.keys() & {FULL, WINDOW}
        by_type = {kind: parameters[kind] for kind in nested} if nested else dict.fromkeys(types, parameters)
    result = {}
    for kind in types - {LINEAR}:
        if kind not in by_type:
            raise UserError(f"{where}: rope_parameters lacks {kind!r}: is it the model's own config.json?")
        found = {"rope_theta": table["ROPE_THETA"], **{name: v for name, v in by_type[kind].items() if v is not None}}
        share = found.get("partial_rotary_factor", table["PARTIAL_ROTARY"])
        if table["PARTIAL_ROTARY"] is not None:
            found["partial_rotary_factor"] = share
        elif share not in (None, 1.0) and found.get("rope_type") != "proportional":
            raise UserError(f"{where}: partial_rotary_factor={share!r} is not supported (only 1.0)")
        head_dim = int(config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"]))
        if table["latent"]:
            head_dim = table["latent"](config)["rope_dim"]
        result[kind] = read_rope(_renamed(found, table), config, head_dim, where, table["ROPE_FIELDS"])
    return result


def _renamed(parameters: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """The rope_type under its name of today where the family had another."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return {**parameters, "rope_type": table["ROPE_ALIASES"].get(kind, kind)}
