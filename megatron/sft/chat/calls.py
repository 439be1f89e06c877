"""Reads the functions that a model may call, and the calls of a turn, in the forms that data has them in."""

from typing import Any

from megatron.sft.chat.field_names import TOOLS_FIELDS
from megatron.sft.chat.fields import checked_list, checked_object, checked_text, is_filled, parsed_json, required_text
from megatron.sft.runtime.errors import UserError

# The functions that a model may call, as OpenAI writes them: `type`, and `function` with `name` and `parameters`.
Tools = list[dict[str, Any]] | None

CALL_FIELDS = {"id", "type", "function", "name", "index"}
ARGUMENTS_FIELDS = ("arguments", "parameters", "input", "args")  # OpenAI, Llama, Anthropic, LangChain
CALL_NEEDS = " with 'name' and 'arguments'"


def read_tools(fields: dict[str, Any], where: str = "") -> Tools:
    """The functions of `tools` or `functions`: a list, or that list as JSON text. None if there are none."""
    found: Tools = None
    for name in TOOLS_FIELDS:
        path = where + name
        tools = checked_list(fields.get(name), path, "functions", or_none=True)
        read = [_tool(tool, f"{path}[{index}]") for index, tool in enumerate(tools)]
        found = joined_tools(found, read, path)
    return found


def joined_tools(found: Tools, more: Tools, where: str) -> Tools:
    """The functions that two fields give, which must be the same if both do."""
    if found and more and found != more:
        raise UserError(f"field '{where}' gives other functions than another field of the record: keep one of them")
    return found or more or None


def _tool(tool: Any, where: str) -> dict[str, Any]:
    tool = checked_object(tool, where, " with 'type' and 'function'", or_text=True)
    if "function" not in tool:
        tool = {"type": "function", "function": tool}  # many data sets have the function alone
    required_text(checked_object(tool["function"], f"{where}.function", " with a name"), "name", f"{where}.function.")
    return tool


def read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of `tool_calls`: a list, or that list as JSON text."""
    return [
        read_call(call, f"{where}[{index}]") for index, call in enumerate(checked_list(value, where, "calls", or_none=True))
    ]


def calls_in_text(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a turn that is nothing else: {"name": ..., "arguments": ...}, or a list of those, also as JSON text."""
    if isinstance(value, str):
        value = parsed_json(checked_text(value, where), where, 'write {"name": ..., "arguments": {...}}')
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise UserError(f"field '{where}' is an empty list: give at least one call")
    return [read_call(call, where) for call in calls]


def read_call(call: Any, where: str) -> dict[str, Any]:
    """One call in OpenAI's form. Its `arguments` are an object, or an object as JSON text, which stays what it is."""
    checked_object(call, where, " with 'function'")
    has_function = isinstance(call.get("function"), dict)
    path = f"{where}.function" if "function" in call else where
    function = checked_object(call.get("function", call), path, CALL_NEEDS)
    _refuse_unknown(call, CALL_FIELDS if has_function else {*CALL_FIELDS, *ARGUMENTS_FIELDS}, where)
    if has_function:
        _refuse_unknown(function, {"name", *ARGUMENTS_FIELDS}, path)
    name = required_text(function, "name", f"{path}.")
    given = [field for field in ARGUMENTS_FIELDS if is_filled(function.get(field))]
    if len(given) > 1:
        raise UserError(f"'{path}' has the arguments {' and '.join(map(repr, given))}: keep one of them")
    # No arguments are {}: null and "" are what some servers write for them.
    arguments = function[given[0]] if given else {}
    argument_path = f"{path}.{given[0]}" if given else path
    if isinstance(arguments, str):
        checked_text(arguments, argument_path)
    checked_object(arguments, argument_path, or_text=True)
    result: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        result["id"] = checked_text(call["id"], f"{where}.id")
    return result


def _refuse_unknown(fields: dict[str, Any], known: set[str], where: str) -> None:
    for name, value in fields.items():
        if name not in known and is_filled(value):
            raise UserError(f"field '{where}.{name}' is unknown in a call: remove it")
