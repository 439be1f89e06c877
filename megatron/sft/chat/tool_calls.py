"""Functions that a model may call, and its calls of them, in the one form that chat templates know (OpenAI's)."""

from typing import Any

import orjson

from megatron.sft.chat.fields import checked_text, json_type, listed, required_text
from megatron.sft.runtime.errors import UserError

CALL_FIELDS = {"id", "type", "function", "name", "arguments", "index"}


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """The functions of a row's `tools`: a list, or a text that holds it as JSON. None if there are none."""
    tools = listed(value)
    if tools in (None, "", [], "[]"):
        return None
    if not isinstance(tools, list):
        raise UserError(
            f"field 'tools' is {json_type(tools)}: it must be a list of functions, or that list as JSON text"
        )
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = _json_object(tool, where)
    if not isinstance(tool, dict):
        raise UserError(f"{where} is {json_type(tool)}: it must be an object with 'type' and 'function'")
    if "function" not in tool:
        tool = {"type": "function", "function": tool}  # the function alone, as many data sets have it
    if not isinstance(tool["function"], dict):
        raise UserError(f"{where}.function is {json_type(tool['function'])}: it must be an object with a name")
    required_text(tool["function"], "name", f"{where}.function.")
    return tool


def tool_calls_of(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of an assistant message: a list, or a text that holds it as JSON. Empty if there are none."""
    calls = listed(value)
    if calls in (None, "", []):
        return []
    if not isinstance(calls, list):
        raise UserError(f"field '{where}' is {json_type(calls)}: it must be a list of calls")
    return [_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def calls_in_text(text: str, where: str) -> list[dict[str, Any]]:
    """What ShareGPT's `function_call` turns say: {"name": ..., "arguments": ...} as JSON, or a list of those."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise UserError(f'field \'{where}\' is no JSON: write {{"name": ..., "arguments": {{...}}}}') from None
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise UserError(f"field '{where}' is an empty list: give at least one call")
    return [_tool_call(call, where) for call in calls]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """One call with `arguments` as they are, an object or a text that is one."""
    if not isinstance(call, dict):
        raise UserError(f"{where} is {json_type(call)}: it must be an object with 'function'")
    for name in call:
        if name not in CALL_FIELDS:
            raise UserError(f"field '{where}.{name}' is unknown in a call: remove it")
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise UserError(f"{where}.function is {json_type(function)}: it must be an object with 'name' and 'arguments'")
    where_function = f"{where}.function." if "function" in call else f"{where}."
    name = required_text(function, "name", where_function)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        checked_text(arguments, f"{where_function}arguments")
        _json_object(arguments, f"{where_function}arguments")
    elif not isinstance(arguments, dict):
        raise UserError(
            f"field '{where_function}arguments' is {json_type(arguments)}: it must be an object, or one as text"
        )
    result: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        result["id"] = checked_text(call["id"], f"{where}.id")
    return result


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise UserError(f"field '{where}' is no JSON: write an object") from None
    if not isinstance(value, dict):
        raise UserError(f"field '{where}' is {json_type(value)}: it must be an object")
    return value
