"""JSON with whole numbers of any size: orjson, or Python's json where a number has more than 64 bits, which orjson rounds."""

import json
import math
from typing import Any

import orjson

_LARGE = 2.0**63  # a float from here on may be a whole number that orjson rounded


def loads(content: bytes | str) -> Any:
    """The value. ValueError for what is not JSON."""
    return loads_with_keys(content)[0]


def loads_with_keys(content: bytes | str) -> tuple[Any, int]:
    """The value, and the number of keys of all its objects after repeated ones were dropped."""
    try:
        value = orjson.loads(content)
        num_keys, is_rounded = _measure(value)
    except orjson.JSONDecodeError as error:
        if "infinity" not in str(error):
            raise
        num_keys, is_rounded = _measure(json.loads(content, parse_float=_finite))  # a whole number of 300 digits
    return (json.loads(content) if is_rounded else value), num_keys


def _finite(text: str) -> float:
    if math.isinf(float(text)):
        raise ValueError(f"the number {text[:20]} is too large")
    return float(text)


def _measure(value: Any) -> tuple[int, bool]:
    """The number of keys of all objects, and whether a number may be rounded."""
    num_keys, is_rounded, waiting = 0, False, [[value]]
    while waiting:
        for item in waiting.pop():
            kind = type(item)
            if kind is dict:
                num_keys += len(item)
                waiting.append(item.values())
            elif kind is list:
                waiting.append(item)
            elif (kind is float or kind is int) and not -_LARGE < item < _LARGE:
                is_rounded = True
    return num_keys, is_rounded


def dumps(value: Any, default: Any = None, sort_keys: bool = False) -> bytes:
    """Compact UTF-8. numpy's numbers are written as numbers; `default` is called for what JSON does not have.

    TypeError or ValueError for what cannot be written, such as a text that is not Unicode.
    """
    options = orjson.OPT_SERIALIZE_NUMPY | (orjson.OPT_SORT_KEYS if sort_keys else 0)
    try:
        return orjson.dumps(value, default=default, option=options)
    except TypeError as error:
        if "64-bit" not in str(error):
            raise
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=default, sort_keys=sort_keys)
    return text.encode("utf-8")
