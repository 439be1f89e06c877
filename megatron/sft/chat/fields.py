"""Reads single fields of a JSON object. What is wrong with one is a `UserError` that names the field and the fix.

`where` is the path of the object within the record, as in `messages[1].`, for the message.
"""

import contextlib
import re
from collections.abc import Iterable
from typing import Any

from megatron.sft.runtime import exact_json
from megatron.sft.runtime.errors import UserError


def required_text(fields: dict[str, Any], name: str, where: str = "") -> str:
    """The text, which must have more than white space."""
    if name not in fields:
        raise UserError(f"field '{where}{name}' is missing: add it, or rename a column with MAP_COLUMNS=OLD={name}")
    text = checked_text(fields[name], where + name)
    if not text.strip():
        raise UserError(f"field '{where}{name}' is empty: fill it, or remove the record")
    return text


def optional_text(fields: dict[str, Any], name: str, where: str = "") -> str:
    """The text, empty if the field is missing or null."""
    value = fields.get(name)
    return "" if value is None else checked_text(value, where + name)


def checked_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"field '{name}' is {json_type(value)}: it must be text")
    if "\0" in value:  # which patterns.py needs for itself
        raise UserError(f"field '{name}' has a NUL character (U+0000), which is not text: remove it")
    return value


def checked_list(value: Any, name: str, of: str, or_none: bool = False) -> list[Any]:
    """The list, which may be JSON text, as tables (CSV, parquet) often have it; with `or_none` empty for null or no text."""
    if or_none and value in (None, ""):
        return []
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        with contextlib.suppress(UserError):
            value = parsed_json(value, name)
    if not isinstance(value, list):
        raise UserError(f"field '{name}' is {json_type(value)}: it must be a list of {of}, or that list as JSON text")
    return value


def checked_object(value: Any, name: str, needs: str = "", or_text: bool = False) -> dict[str, Any]:
    """The object; with `or_text` it may be JSON text. `needs` says in the message what it must have."""
    if or_text and isinstance(value, str):
        value = parsed_json(value, name, f"write an object{needs}")
    if not isinstance(value, dict):
        raise UserError(f"field '{name}' is {json_type(value)}: it must be an object{needs}")
    return value


def parsed_json(text: str, name: str, fix: str = "correct it") -> Any:
    """The JSON value of a text, with whole numbers of any size."""
    try:
        return exact_json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"field '{name}' is not valid JSON: {fix}") from None


def is_filled(value: Any) -> bool:
    """Whether a field says anything: null, an empty text, list or object do not."""
    return value is not None and value not in ("", [], {})


def refuse_fields(fields: dict[str, Any], names: Iterable[str], where: str = "") -> None:
    """Refuse these fields unless they are empty."""
    for name in names:
        if is_filled(fields.get(name)):
            column = re.sub(r"\[\d+\]", "[]", where) + name
            raise UserError(
                f"field '{where}{name}' is not supported, and ignoring it would change what is trained: remove the record, or "
                f'drop the field with MAP_COLUMNS="{column}=-"'
            )


def json_type(value: Any) -> str:
    """A JSON value's type in the words of a message: `a list`, `a number`, `null`."""
    if value is None:
        return "null"
    names = {bool: "true or false", str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
