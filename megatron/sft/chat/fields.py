"""Reads single fields of a row, and says what is wrong with one, by its name, and what to do about it."""

from typing import Any

import orjson

from megatron.sft.runtime.errors import UserError


def required_text(fields: dict[str, Any], name: str, where: str) -> str:
    if name not in fields:
        raise UserError(f"field '{where}{name}' is missing: add it, or rename a column with MAP_COLUMNS=OLD={name}")
    text = checked_text(fields[name], where + name)
    if not text.strip():
        raise UserError(f"field '{where}{name}' is empty: fill it, or remove the row")
    return text


def optional_text(fields: dict[str, Any], name: str, where: str = "") -> str:
    """The text, or an empty one where the field is missing or null."""
    value = fields.get(name)
    return "" if value is None else checked_text(value, where + name)


def checked_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"field '{name}' is {json_type(value)}: it must be text")
    if "\0" in value:
        raise UserError(f"field '{name}' has a NUL character (U+0000), which no text has: remove it")
    return value


def content_text(value: Any, name: str) -> str:
    """A message's content: text, or a list of text parts, as some services write it."""
    if not isinstance(value, list):
        return checked_text(value, name)
    texts = []
    for index, part in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(part, dict) or part.get("type") != "text" or part.keys() - {"type", "text"}:
            raise UserError(f"field '{where}' is no plain text part: only {{'type': 'text', 'text': ...}} is supported")
        texts.append(checked_text(part.get("text"), f"{where}.text"))
    return "".join(texts)


def listed(value: Any) -> Any:
    """A list as it is, or the list that a text holds as JSON: tables (CSV, parquet) often have it so."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            return value
    return value


def required_list(fields: dict[str, Any], name: str, of: str) -> list[Any]:
    value = listed(fields[name])
    if not isinstance(value, list):
        raise UserError(f"field {name!r} is {json_type(value)}: it must be a list of {of}")
    return value


def json_type(value: Any) -> str:
    """A JSON value's type in the words of a message: `a list`, `a number`, `null`."""
    if value is None:
        return "null"
    names = {bool: "true or false", str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
