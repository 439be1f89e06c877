"""Reads single fields of a JSON object, and renames those of a record. What is wrong is a `UserError` that names the field and
the fix.

`where` is the path of the object within the record, as in `messages[1].`, for the message.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from megatron.sft.runtime import exact_json
from megatron.sft.runtime.errors import UserError

NOT_A_COLUMN = "-"
OF_TURNS = "[]."  # MAP_COLUMNS also takes fields of turns: messages[].time=-


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
    if "\0" in value:
        raise UserError(f"field '{name}' has a NUL character (U+0000), which is not text: remove it")
    return value


def checked_list(value: Any, name: str, of: str, or_none: bool = False) -> list[Any]:
    """The list, which may be JSON text, as tables (CSV, parquet) often have it; with `or_none` empty for null or no text."""
    if or_none and value in (None, ""):
        return []
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        with contextlib.suppress(UserError):
            value = parsed_json(value, name)
    if isinstance(value, str) and value.lstrip().startswith(("[{'", "['")):  # as pandas writes lists into a CSV file
        raise UserError(
            f"field '{name}' is a list in Python's spelling ({value.strip()[:20]}...): write it as JSON text, with json.dumps"
        )
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


def renamed_columns(pairs: list[str]) -> dict[str, str]:
    """Old names to new of MAP_COLUMNS, OLD=NEW each. A `UserError` for a name that is given twice."""
    columns: dict[str, str] = {}
    for pair in pairs:
        old, _, new = pair.partition("=")
        if not old or not new or old in columns or (new in columns.values() and new != NOT_A_COLUMN):
            raise UserError(f"MAP_COLUMNS has {pair!r}: give OLD=NEW, each name once, such as problem=instruction")
        columns[old] = new
    return columns


def renamed(record: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The record with its fields renamed, old names to new."""
    if not columns:
        return record
    record = _with_renamed_turns(record, columns)
    for old, new in columns.items():
        if new == NOT_A_COLUMN or OF_TURNS in old:
            continue
        if old not in record:
            raise UserError(f"field {old!r} is missing, which MAP_COLUMNS renames to {new!r}: correct MAP_COLUMNS")
        if new in record and columns.get(new) is None:
            raise UserError(
                f"the record has both {old!r} and {new!r}: remove {old!r} from MAP_COLUMNS, or add {new}=- to skip it"
            )
    renamed = {columns.get(name, name): value for name, value in record.items()}
    renamed.pop(NOT_A_COLUMN, None)
    return renamed


def _with_renamed_turns(record: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The record with the fields of its turns renamed or dropped, as `messages[].time=-` asks for."""
    for list_name in {old.partition(OF_TURNS)[0] for old in columns if OF_TURNS in old} & record.keys():
        listed = record[list_name]
        listed = [listed] if isinstance(listed, dict) else checked_list(listed, list_name, "turns", or_none=True)
        prefix = list_name + OF_TURNS
        names = {
            old.removeprefix(prefix): new.rpartition(OF_TURNS)[2] for old, new in columns.items() if old.startswith(prefix)
        }
        record = record | {list_name: [_renamed_turn(turn, names) if isinstance(turn, dict) else turn for turn in listed]}
    return record


def _renamed_turn(turn: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    items: Iterator[tuple[str, Any]] = ((names.get(name, name), value) for name, value in turn.items())
    renamed = {name: value for name, value in items if name != NOT_A_COLUMN}
    if len(renamed) + sum(names.get(name) == NOT_A_COLUMN for name in turn) != len(turn):
        raise UserError(f"MAP_COLUMNS gives two fields of a turn one name ({', '.join(names.values())}): correct it")
    return renamed
