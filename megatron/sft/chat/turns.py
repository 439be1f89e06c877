"""The turns of one conversation: their roles, their texts, their calls, and which of them ask for training themselves."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from megatron.sft.chat.fields import checked_text, content_text, json_type, optional_text, required_text
from megatron.sft.chat.tool_calls import calls_in_text, tool_calls_of
from megatron.sft.runtime.errors import UserError

# `role` and `content`; an assistant message may have `tool_calls`, a tool message `tool_call_id` and `name`.
Message = dict[str, Any]
Conversation = list[Message]

ROLES = {name: name for name in ("system", "user", "assistant", "tool")}
ROLES |= {"tool_call": "call", "tool_response": "tool"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "call"} | ROLES
LOSS_FIELDS = ("loss", "train", "weight")
REASONING_FIELD = "reasoning_content"
REFUSED_FIELDS = ("function_call", "functions", "audio", "refusal")
USED_FIELDS = {*LOSS_FIELDS, *REFUSED_FIELDS, REASONING_FIELD, "tool_calls", "tool_call_id"}


@dataclass
class Turns:
    """Messages, and of each of them whether its own fields ask for training (None: they do not say)."""

    messages: Conversation = field(default_factory=list)
    trained: list[bool | None] = field(default_factory=list)
    ignored_fields: Counter[str] = field(default_factory=Counter)

    def add(self, message: Message, trained: bool | None = None) -> None:
        self.messages.append(message)
        self.trained.append(trained)

    def insert_system(self, text: str) -> None:
        self.messages.insert(0, {"role": "system", "content": text})
        self.trained.insert(0, None)

    def extend(self, others: "Turns") -> None:
        self.messages.extend(others.messages)
        self.trained.extend(others.trained)
        self.ignored_fields.update(others.ignored_fields)


def listed_turns(listed: list[Any], list_name: str) -> Turns:
    """The turns of a list of objects with role and content, or from and value. Roles are translated."""
    if not listed:
        raise UserError(
            f"field {list_name!r} is an empty list: give at least a user and an assistant turn, or remove the row"
        )
    first = listed[0]
    is_sharegpt = list_name == "conversations" and isinstance(first, dict) and "from" in first
    names = ("from", "value") if is_sharegpt else ("role", "content")
    turns = Turns()
    for index, turn in enumerate(listed):
        where = f"{list_name}[{index}]"
        if not isinstance(turn, dict):
            raise UserError(
                f"{where} is {json_type(turn)}: each turn must be an object with {names[0]!r} and {names[1]!r}"
            )
        message = _message(turn, names, where)
        turns.add(message, _trained(turn, message["role"], where))
        for name in turn:
            if name not in names and name not in USED_FIELDS and not (name == "name" and message["role"] == "tool"):
                turns.ignored_fields[f"{list_name}[].{name}"] += 1
    return turns


def _message(turn: dict[str, Any], names: tuple[str, str], where: str) -> Message:
    """Every text must be there, but for the system's, and an assistant's that calls functions."""
    role_name, text_name = names
    roles = SHAREGPT_ROLES if role_name == "from" else ROLES
    role = roles.get(required_text(turn, role_name, f"{where}."))
    if role is None:
        known = ", ".join(roles)
        raise UserError(f"{where}.{role_name} is {turn[role_name]!r}, an unknown role: use one of {known}")
    if isinstance(turn.get(text_name), list):
        turn = turn | {text_name: content_text(turn[text_name], f"{where}.{text_name}")}
    for name in REFUSED_FIELDS:
        if turn.get(name) not in (None, [], "", {}):
            raise UserError(
                f"field '{where}.{name}' is not supported, and leaving it out would change what is trained: remove it"
            )
    if role == "call":
        calls = calls_in_text(required_text(turn, text_name, f"{where}."), f"{where}.{text_name}")
        return {"role": "assistant", "content": "", "tool_calls": calls}
    calls = tool_calls_of(turn.get("tool_calls"), f"{where}.tool_calls")
    reasoning = optional_text(turn, REASONING_FIELD, f"{where}.")
    if role != "assistant" and (calls or reasoning):
        name = "tool_calls" if calls else REASONING_FIELD
        raise UserError(f"field '{where}.{name}' is in a turn of role {role!r}: only assistant turns have it")
    optional = role in ("system", "tool") or calls
    text = optional_text(turn, text_name, f"{where}.") if optional else required_text(turn, text_name, f"{where}.")
    if role == "tool" and text_name not in turn:
        raise UserError(f"field '{where}.{text_name}' is missing: a result may be empty, but must be there")
    message: Message = {"role": role, "content": _with_reasoning(reasoning, text, where)}
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        message |= {
            name: checked_text(turn[name], f"{where}.{name}") for name in ("tool_call_id", "name") if turn.get(name)
        }
    return message


def _with_reasoning(reasoning: str, text: str, where: str) -> str:
    """Reasoning in a field of its own goes where models write it."""
    if not reasoning.strip():
        return text
    if "</think>" in text or "<think>" in text or "</think>" in reasoning:
        raise UserError(f"{where} has a field {REASONING_FIELD!r} and <think> tags in its texts: keep one of them")
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{text.lstrip()}"


def _trained(turn: dict[str, Any], role: str, where: str) -> bool | None:
    """What the turn's own `loss`, `train` or `weight` says: 0 or 1, false or true."""
    found = None
    for name in LOSS_FIELDS:
        value = turn.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(f"field '{where}.{name}' is {value!r}: it must be 0 or 1, or false or true")
        if found is not None and found != bool(value):
            raise UserError(f"{where} has several of {', '.join(LOSS_FIELDS)}, which disagree: keep one of them")
        found = bool(value)
    if found and role != "assistant":
        raise UserError(f"{where} asks for training, but its role is {role!r}: only assistant turns are trained")
    return found
