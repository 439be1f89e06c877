"""Which conversations belong together: those of rows with the same value in one field, GROUP_KEY."""

import hashlib
from typing import Any

import orjson


def group_of(fields: dict[str, Any], key: str, renamed_columns: dict[str, str]) -> int | None:
    """A 64-bit hash of the row's value of the field `key`, named as in the file or as renamed (old name to new); None
    where the row has none. Two values of a million share a hash with a chance of 3 in 100 million."""
    old_names = {new: old for old, new in renamed_columns.items()}
    value = fields.get(key, fields.get(old_names.get(key, key)))
    if value in (None, "", [], {}):
        return None
    content = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
