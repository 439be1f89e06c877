"""Reads a list of turns: the messages that chat templates know, with their tool calls, and which of them to train."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from megatron.sft.chat.fields import (
    checked_list,
    checked_object,
    checked_text,
    optional_text,
    refuse_fields,
    required_text,
)
from megatron.sft.runtime import exact_json
from megatron.sft.runtime.errors import UserError

# `role` and `content`; an assistant message may have `tool_calls`, a tool message `tool_call_id` and `name`.
Message = dict[str, Any]
Messages = list[Message]
# The functions that a model may call, as OpenAI writes them: `type`, and `function` with `name` and `parameters`.
Tools = list[dict[str, Any]] | None

ROLES = {name: name for name in ("system", "user", "assistant", "tool")}
ROLES |= {"tool_call": "call", "tool_response": "tool"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "call"} | ROLES
LOSS_FIELDS = ("loss", "train", "weight")
REASONING_FIELD = "reasoning_content"
REFUSED_FIELDS = ("function_call", "functions", "audio", "refusal")
USED_FIELDS = {*LOSS_FIELDS, *REFUSED_FIELDS, REASONING_FIELD, "tool_calls", "tool_call_id"}
CALL_FIELDS = {"id", "type", "function", "name", "arguments", "index"}


@dataclass
class Turns:
    """Messages, and for each of them what its own `loss` field says (None: it has none)."""

    messages: Messages = field(default_factory=list)
    loss_flags: list[bool | None] = field(default_factory=list)
    ignored_fields: Counter[str] = field(default_factory=Counter)

    def add(self, message: Message, loss_flag: bool | None = None) -> None:
        self.messages.append(message)
        self.loss_flags.append(loss_flag)

    def __add__(self, other: "Turns") -> "Turns":
        ignored = self.ignored_fields + other.ignored_fields
        return Turns(self.messages + other.messages, self.loss_flags + other.loss_flags, ignored)


def read_turns(listed: list[Any], list_name: str) -> Turns:
    """The turns of a list of objects with role and content, or from and value (ShareGPT)."""
    if not listed:
        raise UserError(
            f"field {list_name!r} is an empty list: give at least a user and an assistant turn, or remove the record"
        )
    first = listed[0]
    is_sharegpt = list_name == "conversations" and isinstance(first, dict) and "from" in first
    names = ("from", "value") if is_sharegpt else ("role", "content")
    turns = Turns()
    for index, turn in enumerate(listed):
        where = f"{list_name}[{index}]"
        checked_object(turn, where, f" with {names[0]!r} and {names[1]!r}")
        message = _message(turn, names, f"{where}.")
        turns.add(message, _loss_flag(turn, message["role"], where))
        for name in turn:
            if name not in names and name not in USED_FIELDS and not (name == "name" and message["role"] == "tool"):
                turns.ignored_fields[f"{list_name}[].{name}"] += 1
    return turns


def _message(turn: dict[str, Any], names: tuple[str, str], where: str) -> Message:
    """Content may be empty only for the system, a function's result, and an assistant that calls functions."""
    role_name, text_name = names
    roles = SHAREGPT_ROLES if role_name == "from" else ROLES
    role = roles.get(required_text(turn, role_name, where))
    if role is None:
        known = ", ".join(roles)
        raise UserError(f"{where}{role_name} is {turn[role_name]!r}, an unknown role: use one of {known}")
    if isinstance(turn.get(text_name), list):
        turn = turn | {text_name: _joined_parts(turn[text_name], where + text_name)}
    refuse_fields(turn, REFUSED_FIELDS, where)
    if role == "call":
        calls = _calls_in_text(required_text(turn, text_name, where), where + text_name)
        return {"role": "assistant", "content": "", "tool_calls": calls}
    calls = _tool_calls(turn.get("tool_calls"), f"{where}tool_calls")
    reasoning = optional_text(turn, REASONING_FIELD, where)
    if role != "assistant" and (calls or reasoning):
        name = "tool_calls" if calls else REASONING_FIELD
        raise UserError(f"field '{where}{name}' is in a turn of role {role!r}: only assistant turns have it")
    if role == "tool" and text_name not in turn:
        raise UserError(f"field '{where}{text_name}' is missing: a result may be empty, but must be there")
    may_be_empty = role in ("system", "tool") or calls
    text = (optional_text if may_be_empty else required_text)(turn, text_name, where)
    if reasoning.strip():
        text = _with_reasoning(reasoning, text, where)
    message: Message = {"role": role, "content": text}
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        message |= {name: checked_text(turn[name], where + name) for name in ("tool_call_id", "name") if turn.get(name)}
    return message


def _joined_parts(parts: list[Any], name: str) -> str:
    """A content in parts, as OpenAI's API has it; all must be text."""
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or part.keys() - {"type", "text"}:
            raise UserError(
                f"field '{name}[{index}]' is not a plain text part: only {{'type': 'text', 'text': ...}} is supported"
            )
    return "".join(checked_text(part.get("text"), f"{name}[{index}].text") for index, part in enumerate(parts))


def _with_reasoning(reasoning: str, text: str, where: str) -> str:
    """The reasoning of `reasoning_content` written into the content, in the way that models write it."""
    if "</think>" in text or "<think>" in text or "</think>" in reasoning:
        raise UserError(f"'{where}{REASONING_FIELD}' and <think> tags in the texts of one turn: keep one of them")
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{text.lstrip()}"


def _loss_flag(turn: dict[str, Any], role: str, where: str) -> bool | None:
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


def read_tools(value: Any) -> Tools:
    """The functions of a record's `tools`: a list, or that list as JSON text. None if there are none."""
    tools = checked_list(value, "tools", "functions", or_none=True)
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)] or None


def _tool(tool: Any, where: str) -> dict[str, Any]:
    tool = checked_object(tool, where, " with 'type' and 'function'", or_text=True)
    if "function" not in tool:
        tool = {"type": "function", "function": tool}  # many data sets have the function alone
    required_text(checked_object(tool["function"], f"{where}.function", " with a name"), "name", f"{where}.function.")
    return tool


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of an assistant message: a list, or that list as JSON text."""
    return [
        _tool_call(call, f"{where}[{index}]")
        for index, call in enumerate(checked_list(value, where, "calls", or_none=True))
    ]


def _calls_in_text(text: str, where: str) -> list[dict[str, Any]]:
    """The calls of a ShareGPT `function_call` turn: {"name": ..., "arguments": ...} as JSON, or a list of those."""
    try:
        value = exact_json.loads(text)
    except ValueError:
        raise UserError(f'field \'{where}\' is not valid JSON: write {{"name": ..., "arguments": {{...}}}}') from None
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise UserError(f"field '{where}' is an empty list: give at least one call")
    return [_tool_call(call, where) for call in calls]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """One call in OpenAI's form. Its `arguments` stay what they are: an object, or an object as JSON text."""
    checked_object(call, where, " with 'function'")
    for name in call:
        if name not in CALL_FIELDS:
            raise UserError(f"field '{where}.{name}' is unknown in a call: remove it")
    path = f"{where}.function" if "function" in call else where
    function = checked_object(call.get("function", call), path, " with 'name' and 'arguments'")
    name = required_text(function, "name", f"{path}.")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        checked_text(arguments, f"{path}.arguments")
    checked_object(arguments, f"{path}.arguments", or_text=True)
    result: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        result["id"] = checked_text(call["id"], f"{where}.id")
    return result
