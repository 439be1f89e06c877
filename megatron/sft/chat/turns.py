"""Reads a list of turns: the messages that chat templates know, with their tool calls, and which of them to train."""

from dataclasses import dataclass, field, replace
from typing import Any

from megatron.sft.chat.calls import Tools, calls_in_text, joined_tools, read_calls, read_tools
from megatron.sft.chat.content_parts import with_joined_parts
from megatron.sft.chat.field_names import (
    DETAIL_FIELDS,
    KEY_ROLES,
    LOSS_FIELDS,
    MASKED,
    MEDIA_FIELDS,
    REASONING_FIELDS,
    ROLES,
    TOOLS_FIELDS,
    role_of,
    role_of_key,
)
from megatron.sft.chat.fields import (
    checked_object,
    checked_text,
    is_filled,
    json_type,
    optional_text,
    refuse_fields,
    required_text,
)
from megatron.sft.runtime.errors import UserError

__all__ = ["Message", "Messages", "Tools", "Turns", "read_turns"]

# `role` and `content`; an assistant message may have `tool_calls`, a tool message `tool_call_id` and `name`.
Message = dict[str, Any]
Messages = list[Message]

ROLE_NAMES, TEXT_NAMES = ("role", "from"), ("content", "value", "text")
REFUSED_FIELDS = (*MEDIA_FIELDS, "refusal")
USED_FIELDS = {*LOSS_FIELDS, *DETAIL_FIELDS, *REASONING_FIELDS, *TOOLS_FIELDS, *REFUSED_FIELDS}
USED_FIELDS |= {"tool_calls", "function_call", "tool_call_id"}


@dataclass
class Turns:
    """Messages, and for each of them what its own `loss` field says (None: it has none).

    tools: the functions that a system turn names. extras: path, name and value of the fields that are not used.
    """

    messages: Messages = field(default_factory=list)
    loss_flags: list[bool | None] = field(default_factory=list)
    tools: Tools = None
    extras: list[tuple[str, str, Any]] = field(default_factory=list)

    def add(self, message: Message, loss_flag: bool | None = None) -> None:
        self.messages.append(message)
        self.loss_flags.append(loss_flag)

    def add_call(self, message: Message, loss_flag: bool | None, where: str) -> None:
        """A turn of nothing but calls belongs to the answer before it: a text, or other calls."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.add(message, loss_flag)
            return
        previous, previous_flag = self.messages[-1], self.loss_flags[-1]
        if previous_flag is not None and loss_flag is not None and previous_flag != loss_flag:
            raise UserError(f"{where} is trained otherwise than the turn before it, of which it is a part: correct either")
        self.loss_flags[-1] = previous_flag if loss_flag is None else loss_flag
        content = "\n\n".join(text for text in (previous["content"], message["content"]) if text)
        calls = previous.get("tool_calls", []) + message["tool_calls"]
        self.messages[-1] = previous | {"content": content, "tool_calls": calls}

    def __add__(self, other: "Turns") -> "Turns":
        return Turns(
            self.messages + other.messages,
            self.loss_flags + other.loss_flags,
            joined_tools(self.tools, other.tools, "tools"),
            self.extras + other.extras,
        )


def read_turns(listed: list[Any], list_name: str) -> Turns:
    """The turns of a list: objects with role and content, from and value (ShareGPT), objects {role: text} with one or more
    roles, or texts by the user and the assistant in turn."""
    if not listed:
        raise UserError(
            f"field {list_name!r} is an empty list: give at least a user and an assistant turn, or remove the record"
        )
    turns = Turns()
    if all(isinstance(turn, str) for turn in listed):
        for index, text in enumerate(listed):
            content = required_text({f"[{index}]": text}, f"[{index}]", list_name)
            turns.add({"role": "assistant" if index % 2 else "user", "content": content})
        return turns
    role_name, text_name = _turn_names(listed[0])
    for index, turn in enumerate(listed):
        where = f"{list_name}[{index}]"
        checked_object(turn, where, f" with {role_name!r} and {text_name!r}")
        if role_name not in turn and any(role_of_key(name) for name in turn):
            _add_turns_of_keys(turns, turn, where, list_name)
        else:
            _add_turn(turns, turn, (role_name, text_name), where, list_name)
    return turns


def _turn_names(turn: Any) -> tuple[str, str]:
    """The names of the role and of the text, as the first turn has them."""
    keys = turn if isinstance(turn, dict) else ()
    role_name = next((name for name in ROLE_NAMES if name in keys), "role")
    usual = ("value", "content", "text") if role_name == "from" else TEXT_NAMES
    return role_name, next((name for name in usual if name in keys), usual[0])


def _add_turn(turns: Turns, turn: dict[str, Any], names: tuple[str, str], where: str, list_name: str) -> None:
    has_more = len(turn) != len(names) or names[1] not in turn  # than a role and a text, which few turns have
    role, message = _message(turn, names, f"{where}.", has_more)
    loss_flag = _loss_flag(turn, message["role"], where) if has_more else None
    if role == "call":
        turns.add_call(message, loss_flag, where)
    else:
        turns.add(message, loss_flag)
    if not has_more:
        return
    tools = read_tools(turn, f"{where}.")
    if tools and role != "system":
        raise UserError(
            f"'{where}' names functions, but its role is {role!r}: move them to the system turn, or the record's 'tools'"
        )
    turns.tools = joined_tools(turns.tools, tools, f"{where}.tools")
    for name, value in turn.items():
        if name not in names and name not in USED_FIELDS and not (name == "name" and role == "tool"):
            turns.extras.append((f"{list_name}[].{name}", name, value))


def _add_turns_of_keys(turns: Turns, turn: dict[str, Any], where: str, list_name: str) -> None:
    """The turns of one object {role: text}, such as {"human": ..., "assistant": ...}, in the order of a conversation."""
    rest = {name: value for name, value in turn.items() if not role_of_key(name)}
    by_role: dict[str, str] = {}
    for name in turn:
        if (role := role_of_key(name)) and by_role.setdefault(role, name) != name:
            raise UserError(f"'{where}' has both {by_role[role]!r} and {name!r}: keep one of them")
    present = [role for role in KEY_ROLES if role in by_role and (role == "assistant" or is_filled(turn[by_role[role]]))]
    for role in present:
        # What else the object says, says it of its answer.
        fields = {"role": role, "content": turn[by_role[role]]} | (rest if role == present[-1] else {})
        _add_turn(turns, fields, ("role", "content"), where, list_name)


def _message(turn: dict[str, Any], names: tuple[str, str], where: str, has_more: bool) -> tuple[str, Message]:
    """A role of ROLES, and the message. Its content may be empty only for the system, a function's result, and an assistant
    that calls functions."""
    role_name, text_name = names
    role = role_of(required_text(turn, role_name, where))
    if role is None:
        known = ", ".join(name for group in ROLES.values() for name in group)
        raise UserError(f"{where}{role_name} is {turn[role_name]!r}, an unknown role: use one of {known}")
    if role != "call" and isinstance(turn.get(text_name), list):
        turn, has_more = with_joined_parts(turn, text_name, where), True
    calls, reasoning = [], ""
    if has_more:
        refuse_fields(turn, REFUSED_FIELDS, where)
        reasoning = reasoning_of(turn, where)
    if has_more or role == "call":
        calls = _calls(turn, role, text_name, where)
    if role == "call":
        turn = turn | {text_name: ""}
    if role not in ("assistant", "call") and (calls or reasoning):
        name = "tool_calls" if calls else next(name for name in REASONING_FIELDS if turn.get(name))
        raise UserError(f"field '{where}{name}' is in a turn of role {role!r}: only assistant turns have it")
    if role == "tool" and text_name not in turn:
        raise UserError(f"field '{where}{text_name}' is missing: a result may be empty, but must be there")
    may_be_empty = role in ("system", "tool") or calls
    text = (optional_text if may_be_empty else required_text)(turn, text_name, where)
    if reasoning:
        text = with_reasoning(reasoning, text, where)
    message: Message = {"role": "assistant" if role == "call" else role, "content": text}
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        message |= {name: checked_text(turn[name], where + name) for name in ("tool_call_id", "name") if turn.get(name)}
    return role, message


def _calls(turn: dict[str, Any], role: str, text_name: str, where: str) -> list[dict[str, Any]]:
    """The calls of `tool_calls`, of `function_call`, or of the text of a turn that is nothing else. Only one may have any."""
    found = {"tool_calls": read_calls(turn.get("tool_calls"), f"{where}tool_calls")}
    if is_filled(turn.get("function_call")):
        found["function_call"] = calls_in_text(turn["function_call"], f"{where}function_call")
    if role == "call":
        is_value = isinstance(turn.get(text_name), list | dict)
        text = turn[text_name] if is_value else required_text(turn, text_name, where)
        found[text_name] = calls_in_text(text, where + text_name)
    names = [name for name, calls in found.items() if calls]
    if any(found[name] != found[names[0]] for name in names):
        raise UserError(f"'{where}{names[0]}' and '{where}{names[1]}' have different calls: keep one of them")
    return found[names[0]] if names else []


def reasoning_of(fields: dict[str, Any], where: str = "") -> str:
    """The reasoning, by any of its names; empty if there is none. Two names must have the same text."""
    found = ""
    for name in REASONING_FIELDS:
        if name not in fields:
            continue
        text = optional_text(fields, name, where).strip()
        if found and text and text != found:
            raise UserError(f"field '{where}{name}' differs from another reasoning of the same turn: keep one of them")
        found = found or text
    return found


def with_reasoning(reasoning: str, text: str, where: str) -> str:
    """The reasoning written into the content, in the way that models write it."""
    if "</think>" in text or "<think>" in text or "</think>" in reasoning:
        raise UserError(f"'{where}reasoning_content' and <think> tags in the texts of one turn: keep one of them")
    return f"<think>\n{reasoning}\n</think>\n\n{text.lstrip()}"


def _loss_flag(turn: dict[str, Any], role: str, where: str) -> bool | None:
    """What the turn's own `loss`, or a field of the same meaning, says: 0 or 1, false or true."""
    for name in DETAIL_FIELDS:
        if is_filled(turn.get(name)):
            raise UserError(
                f"field '{where}.{name}' trains a part of the turn, which is not supported: use 'loss' with 0 or 1 for "
                "the whole turn, or split it"
            )
    found = None
    for name in LOSS_FIELDS:
        value = turn.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            shown = json_type(value) if isinstance(value, list | dict) else repr(value)
            raise UserError(
                f"field '{where}.{name}' is {shown}: it must be 0 or 1, or false or true; fractions are not supported"
            )
        flag = bool(value) != (name == MASKED)
        if found is not None and found != flag:
            raise UserError(f"{where} has several of {', '.join(LOSS_FIELDS)}, which disagree: keep one of them")
        found = flag
    if found and role != "assistant":
        raise UserError(f"{where} asks for training, but its role is {role!r}: only assistant turns are trained")
    return found


def without_training(turns: Turns) -> Turns:
    """The turns, of which only those are trained that ask for it."""
    return replace(turns, loss_flags=[bool(flag) for flag in turns.loss_flags])
