"""The arguments of a call as the texts that a template prints of them: whole, or parameter by parameter.

    {"city": "Paris", "days": 2}   ->   object of a text and a number;  "city", "Paris", "days", 2

A template is shown marks in place of these, of the same kinds, as a template may print a text otherwise than a number.
"""

import json
from collections.abc import Iterator
from typing import Any

from megatron.sft.runtime.errors import UserError

# What a template prints of a value: a text in any of its forms (skeleton.printed_forms), or one of these spellings.
Text = str | tuple[str, ...]
# A kind and what it holds: ("text",), ("number",), ("list", *shapes), ("object", *(rank of name, shape)).
Shape = tuple[Any, ...]


def arguments_text(arguments: Any) -> str:
    """Arguments as JSON text; a text stays as it is."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def arguments_object(arguments: Any) -> Any:
    """Arguments as an object; a `UserError` if their text has a name twice, of which an object would keep one."""
    return json.loads(arguments, object_pairs_hook=_distinct) if isinstance(arguments, str) else arguments


def split_value(value: Any) -> tuple[Shape, list[Text]]:
    """Shape and texts of a JSON value: the texts of a list or object one after the other, each name before its value."""
    if isinstance(value, str):
        return ("text",), [value]
    if isinstance(value, list):
        parts = [split_value(item) for item in value]
        return ("list", *(shape for shape, _ in parts)), [text for _, texts in parts for text in texts]
    if isinstance(value, dict):
        # With the ranks, a template that sorts the names puts the marks in the order of the texts.
        ranks = {name: rank for rank, name in enumerate(sorted(value))}
        texts: list[Text] = []
        shapes = []
        for name, item in value.items():
            shape, more = split_value(item)
            shapes.append((ranks[name], shape))
            texts += [name, *more]
        return ("object", *shapes), texts
    # Templates print true as JSON or as Python does.
    return ("number",), [tuple(dict.fromkeys((json.dumps(value), str(value))))]


def marked_value(shape: Shape, prefix: str, numbers: Iterator[int]) -> tuple[Any, list[str]]:
    """A value of this shape, and the marks in it in the order of its texts. `numbers` are used up for marks; those of an
    object's names sort as the names do."""
    kind, *parts = shape  # an empty list or object is the template's to print: there is nothing to prove
    if kind == "list":
        items = [marked_value(part, prefix, numbers) for part in parts]
        return [value for value, _ in items], [mark for _, marks in items for mark in marks]
    if kind == "object":
        result, marks = {}, []
        for rank, part in parts:
            name = f"{prefix}KEY{rank:04d}N{next(numbers)}X"
            result[name], more = marked_value(part, prefix, numbers)
            marks += [name, *more]
        return result, marks
    number = next(numbers)
    if kind == "number":
        return number, [str(number)]
    return f"{prefix}VALUE{number}X", [f"{prefix}VALUE{number}X"]


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        name = next(name for name in names if names.count(name) > 1)
        raise UserError(f"the arguments of a call have {name!r} twice: keep one of them")
    return dict(pairs)
