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

from megatron.sft.chat.fields import json_type
from megatron.sft.runtime import exact_json
from megatron.sft.runtime.errors import UserError

PIECE_SIZE = 1 << 20  # characters or bytes that are read at a time
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
WHITESPACE = b" \t\r\n"
_SPACES = re.compile(r"[ \t\r\n]*")
_OBJECTS, _OPENED = re.compile(r"\[[ \t\r\n]*\{"), re.compile(r"\[[ \t\r\n]*")
# An error this close to the end of the text may come from a token that continues in the next piece, such as \ud83d\ude00.
_LONGEST_TOKEN = 16
_DECODER = json.JSONDecoder()
_OF_A_MESSAGE = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
# Fields of an object around the records of a whole file, such as {"type": "text2text", "instances": [...]}, and next to them.
_WRAPPERS = ("data", "instances", "records", "rows", "examples", "samples", "items", "train")
_OF_A_FILE = {
    *("type", "version", "name", "title", "description", "license", "author", "authors", "source", "url", "homepage"),
    *("citation", "created", "date", "id", "language", "split", "config", "dataset", "count", "total", "metadata", "info"),
    *("features", "num_rows_total", "num_rows_per_page", "partial"),
}


def decoded_record(content: bytes, place: str) -> dict[str, Any]:
    """One JSON object, or a list of messages, which becomes the object {"messages": [...]}. Anything else is a `UserError` that
    starts with `place`.

    orjson refuses bad UTF-8, lone surrogates, NaN, nesting that is too deep and trailing text, but it takes the last of two
    equal keys, so repeated keys are looked for here.
    """
    try:
        record, num_keys = exact_json.loads_with_keys(content)
        # Every key ends with `":`. A text may contain that too, so only a different count asks for a closer look.
        if content.count(b'":') - content.count(b'\\":') != num_keys:
            _refuse_repeated_keys(content, place)
    except RecursionError:
        raise UserError(f"{place}: not valid JSON for a record (nested hundreds of levels deep): correct it") from None
    except ValueError as error:
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as bad:
            raise UserError(f"{place}: byte {bad.start + 1} of the record is not UTF-8: save the file as UTF-8") from None
        if special := _python_only(content):
            raise UserError(f"{place}: not valid JSON ({special})") from None
        reason = str(error).split(":")[0]
        raise UserError(f"{place}: not valid JSON ({reason}): write one JSON object per record") from None
    if is_conversation(record):
        return {"messages": record}
    if not isinstance(record, dict):
        raise UserError(f"{place}: the record is {json_type(record)}: write one JSON object per record")
    return record


def _python_only(content: bytes) -> str:
    """What makes this text JSON to Python's own `json` alone, and what to do about it; empty if nothing does."""
    found: list[str] = []
    try:
        value = json.loads(content, parse_constant=found.append)
    except (ValueError, RecursionError):
        return ""
    if found:
        return f"it has {found[0]}, which is not JSON, though Python writes it: write null"
    if re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)):
        return "a text has half of a surrogate pair, such as \\ud83d alone: remove it or write the whole character"
    return ""


def is_json(content: bytes) -> bool:
    """Whether these bytes are one JSON value."""
    try:
        exact_json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def is_conversation(value: Any) -> bool:
    """Whether a JSON value is a list of messages."""
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and any(fields <= value.keys() for fields in _OF_A_MESSAGE)


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

    A `UserError` where the array is not closed, continues after its end, holds messages, or has an element whose end cannot be
    found.
    """
    text = _JsonText(file, path)
    text.next_character()
    yield from text.elements()
    text.check_end("JSON array")


def field_elements(name: str, file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """The same for the array in this field of the object that is the whole file. Other fields must only describe the file."""
    text = _JsonText(file, path)
    for field in text.fields():
        if field == name:
            yield from text.elements()
        elif _DECODER.decode(text.element()) and field not in _OF_A_FILE:
            raise text.error(f"the object has {field!r} next to the records in {name!r}: write the records alone, one per line")
    text.check_end("JSON object")


def object_values(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """(line it starts on, content) of every value of a file of one or more objects over several lines."""
    text = _JsonText(file, path)
    while text.next_character():
        yield text.line, text.element().encode("utf-8", "surrogateescape")


def wrapping_field(file: BinaryIO, path: Path) -> str | None:
    """The field of the object that begins the file whose value is the list of the file's records; None for another object.

    A `UserError` for what is not valid JSON, and for an object with more after it on a single line.
    """
    text = _JsonText(file, path)
    text.next_character()
    line = text.line
    for name in text.fields():
        if name in _WRAPPERS and text.holds_records():
            return name
        text.element()
    if text.line == line and text.next_character() and text.line == line:
        raise text.error("more than one value: write one JSON object per record")
    return None


class _JsonText:
    """The unread text of a file: `text[position:]`, which starts on line `line`."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = text_of(file)
        self.path = path
        self.text = ""
        self.position = 0
        self.line = 1

    def error(self, message: str) -> UserError:
        return UserError(f"{self.path}, line {self.line}: {message}")

    def elements(self) -> Iterator[tuple[int, bytes]]:
        """(line it starts on, content) of every element of the array that begins here."""
        self.take(1)
        is_first = True
        while self._has_another("]", "JSON array", is_first):
            line, content = self.line, self.element()
            if is_first and is_message(_DECODER.decode(content)):
                raise self.error('the list holds messages, not records: write {"messages": [...]} for each conversation')
            yield line, content.encode("utf-8", "surrogateescape")
            is_first = False
        self.take(1)

    def fields(self) -> Iterator[str]:
        """The names of the object that begins here. Who iterates reads each value before the next name."""
        self.next_character()
        self.take(1)
        is_first = True
        while self._has_another("}", "JSON object", is_first):
            name = _DECODER.decode(self.element())
            if self.next_character() != ":":
                raise self.error(f"expected `:` after {name!r}")
            self.take(1)
            self.next_character()
            yield name
            is_first = False
        self.take(1)

    def _has_another(self, end: str, what: str, is_first: bool) -> bool:
        """Whether another part follows, which is then next, or `end`, which stays unread."""
        found, follows = self.next_character(), is_first
        if not is_first and found == ",":
            self.take(1)
            found, follows = self.next_character(), True
            if found == end:
                raise self.error(f"`,` before the end of the {what}: remove it")
        if not found:
            raise self.error(f"the {what} is not closed with `{end}`: the file is cut short")
        if not follows and found != end:
            raise self.error(f"expected `,` or `{end}` after a record, found {found!r}")
        return found != end

    def check_end(self, what: str) -> None:
        if rest := self.next_character():
            raise self.error(f"{rest!r} after the end of the {what}: remove it")

    def holds_records(self) -> bool:
        """Whether the value that begins here is a list of objects that are not messages. It stays unread."""
        self.next_character()
        while True:
            if start := _OBJECTS.match(self.text, self.position):
                try:
                    return not is_message(_DECODER.raw_decode(self.text, start.end() - 1)[0])
                except json.JSONDecodeError:
                    pass  # it may continue
            elif not _OPENED.fullmatch(self.text, self.position):
                return False
            if not self.read_more():
                return False

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
                raise self.error(f"not valid JSON ({error.msg}), so the next record cannot be found: correct it") from None
            except RecursionError:
                raise self.error("not valid JSON for a record (nested hundreds of levels deep): correct it") from None
            size = end - self.position
            # A number at the end of the text may continue.
            if end < len(self.text) or not self.read_more():
                return self.take(size)
