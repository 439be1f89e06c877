"""Reads a content that is a list of parts, as the APIs of OpenAI and Anthropic and LLaMA-Factory's format have it."""

from typing import Any

from megatron.sft.chat.calls import calls_in_text
from megatron.sft.chat.field_names import is_metadata
from megatron.sft.chat.fields import checked_text, is_filled
from megatron.sft.runtime.errors import UserError

# type: the names that its value may have. `value` is LLaMA-Factory's.
TEXT_TYPES = dict.fromkeys(("text", "input_text", "output_text"), ("text", "value"))
REASONING_TYPES = {"reasoning": ("reasoning", "text", "value"), "thinking": ("thinking", "text", "value")}
CALL_TYPES = dict.fromkeys(("tool_call", "function_call"), ("value",))
PART_TYPES = TEXT_TYPES | REASONING_TYPES | CALL_TYPES
# What servers add to a part, which says nothing of its text.
MORE_KEYS = {"type", "cache_control", "signature", "citations", "id", "index"}


def with_joined_parts(turn: dict[str, Any], text_name: str, where: str) -> dict[str, Any]:
    """The turn with the text of its parts as content, their reasoning as `reasoning_content`, their calls as `tool_calls`."""
    texts: list[str] = []
    reasonings: list[str] = []
    calls: list[Any] = []
    for index, part in enumerate(turn[text_name]):
        name = f"{where}{text_name}[{index}]"
        kind, value, value_name = _part(part, name)
        if kind in CALL_TYPES:
            calls += calls_in_text(value, value_name)
        else:
            if texts and kind in REASONING_TYPES:
                raise UserError(f"field '{name}' is reasoning after a text: put it before the text")
            (reasonings if kind in REASONING_TYPES else texts).append(checked_text(value, value_name))
    joined = turn | {text_name: "".join(texts)}
    for name, found in (("reasoning_content", "".join(reasonings)), ("tool_calls", calls)):
        if found and is_filled(turn.get(name)):
            raise UserError(f"'{where}{name}' and the parts of '{where}{text_name}' have the same: keep one of them")
        if found:
            joined[name] = found
    return joined


def _part(part: Any, name: str) -> tuple[str, Any, str]:
    """Its type, its value, and the path of that."""
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in PART_TYPES:
        shown = f"of type {kind!r}" if isinstance(part, dict) else repr(part)[:40]
        raise UserError(
            f"field '{name}' is not a plain text part, but {shown}: only {{'type': 'text', 'text': ...}} and parts of "
            f"reasoning are supported: change the record, or remove it"
        )
    for key, value in part.items():
        if key not in MORE_KEYS and key not in PART_TYPES[kind] and is_filled(value) and not is_metadata(key, value, part):
            raise UserError(f"field '{name}.{key}' is unknown in a part of type {kind!r}: remove it")
    keys = [key for key in PART_TYPES[kind] if part.get(key) is not None]
    if len(keys) > 1:
        raise UserError(f"'{name}' has both {keys[0]!r} and {keys[1]!r}: keep one of them")
    value_name = keys[0] if keys else PART_TYPES[kind][0]
    return kind, part.get(value_name), f"{name}.{value_name}"
