"""Cuts JSON lines, or the elements of one JSON array, out of a stream, and decodes single records.

Memory is bounded by the longest record, never by the file. Records are cut out first and decoded in full later, so that a bad
one is refused by itself and those after it can still be read; only damage that hides where a record ends stops the reading.
"""

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from megatron.sft.chat.fields import json_type
from megatron.sft.runtime.errors import UserError

PIECE_SIZE = 1 << 20  # characters or bytes that are read at a time
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
WHITESPACE = b" \t\r\n"
_SPACES = re.compile(r"[ \t\r\n]*")
# An error this close to the end of the text may come from a token that continues in the next piece, such as \ud83d\ude00.
_LONGEST_TOKEN = 16
_DECODER = json.JSONDecoder()


def decoded_record(content: bytes, place: str) -> dict[str, Any]:
    """One JSON object; anything else is a `UserError` that starts with `place`.

    orjson refuses bad UTF-8, lone surrogates, NaN, nesting that is too deep and trailing text, but it takes the last of two
    equal keys, so repeated keys are looked for here.
    """
    try:
        record = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as bad:
            raise UserError(
                f"{place}: byte {bad.start + 1} of the record is not UTF-8: save the file as UTF-8"
            ) from None
        reason = str(error).split(":")[0]
        raise UserError(f"{place}: not valid JSON ({reason}): write one JSON object per record") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: the record is {json_type(record)}: write one JSON object per record")
    try:
        # Every key ends with `":`. A text may contain that too, so only a different count asks for a closer look.
        num_colons = content.count(b'":') - content.count(b'\\":')
        if num_colons != _num_keys(record):
            _refuse_repeated_keys(content, place)
    except RecursionError:
        raise UserError(f"{place}: not valid JSON for a record (nested hundreds of levels deep): correct it") from None
    return record


def _num_keys(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(_num_keys(item) for item in value.values() if isinstance(item, dict | list))
    return sum(_num_keys(item) for item in value if isinstance(item, dict | list))


def _refuse_repeated_keys(content: bytes, place: str) -> None:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            (key, _), *_ = (Counter(key for key, _ in pairs) - Counter(fields.keys())).items()
            raise UserError(f"{place}: field {key!r} is repeated: keep one of them")
        return fields

    json.loads(content, object_pairs_hook=unique)


def text_of(file: BinaryIO) -> io.TextIOWrapper:
    """The file as UTF-8 text with its line ends as they are. Bytes that are not UTF-8 become lone surrogates, which no UTF-8
    text has, so that only their own record is refused."""
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """(line, content) of every line that is not blank, counted from 1."""
    for line, content in enumerate(file, start=1):
        if line == 1:
            content = content.removeprefix(BYTE_ORDER_MARK)
        if content.strip(WHITESPACE):
            yield line, content


def array_elements(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """(line it starts on, content) of every element of the array that is the whole file.

    A `UserError` where the array is not closed, continues after its end, or has an element whose end cannot be found.
    """
    array = _ArrayText(file, path)
    array.next_character()
    array.take(1)  # the opening bracket, which `sources.file_format` has seen
    while (first := array.next_character()) != "]":
        if not first:
            raise array.error("the JSON array is not closed with `]`: the file is cut short")
        line = array.line
        yield line, array.element().encode("utf-8", "surrogateescape")
        separator = array.next_character()
        if separator == ",":
            array.take(1)
            if array.next_character() == "]":
                raise array.error("`,` before the end of the JSON array: remove it")
        elif separator not in ("]", ""):
            raise array.error(f"expected `,` or `]` after a record, found {separator!r}")
    array.take(1)
    if rest := array.next_character():
        raise array.error(f"{rest!r} after the end of the JSON array: remove it")


class _ArrayText:
    """The unread text of a file: `text[position:]`, which starts on line `line`."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = text_of(file)
        self.path = path
        self.text = ""
        self.position = 0
        self.line = 1

    def error(self, message: str) -> UserError:
        return UserError(f"{self.path}, line {self.line}: {message}")

    def read_more(self) -> bool:
        """Append at least as much as is unread, so that a long element is decoded only a few times. False at the end."""
        unread = self.text[self.position :]
        more = self.file.read(max(PIECE_SIZE, len(unread)))
        self.text, self.position = unread + more, 0
        return bool(more)

    def take(self, size: int) -> str:
        content = self.text[self.position : self.position + size]
        self.line += content.count("\n")
        self.position += size
        return content

    def next_character(self) -> str:
        """The next character that is not white space, which stays unread; empty at the end of the file."""
        while True:
            spaces = _SPACES.match(self.text, self.position)
            assert spaces is not None
            self.take(len(spaces.group()))
            if self.position < len(self.text) or not self.read_more():
                return self.text[self.position : self.position + 1]

    def element(self) -> str:
        """The text of the JSON value that starts here."""
        while True:
            try:
                _, end = _DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text)
                if (is_cut or error.pos > len(self.text) - _LONGEST_TOKEN) and self.read_more():
                    continue
                if is_cut:
                    raise self.error("the file ends inside this record: it is cut short") from None
                raise self.error(
                    f"not valid JSON ({error.msg}), so the next record cannot be found: correct it"
                ) from None
            except RecursionError:
                raise self.error("not valid JSON for a record (nested hundreds of levels deep): correct it") from None
            size = end - self.position
            # A number at the end of the text may continue.
            if end < len(self.text) or not self.read_more():
                return self.take(size)
