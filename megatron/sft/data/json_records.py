"""Cuts JSON lines, or the elements of one JSON array, out of a stream a piece at a time, and decodes single rows.

Memory is bounded by the longest row, never by the file. A row that is no valid JSON is found when it is decoded, so that
the rows after it can still be read; only damage between the rows ends the reading.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from megatron.sft.chat.fields import json_type
from megatron.sft.runtime.errors import UserError

PIECE_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
WHITESPACE = b" \t\r\n"
# One JSON string (group 1 is its closing quote, absent when the piece or the line ends inside it) or one bracket.
STRING_OR_BRACKET = re.compile(rb'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+(")?|[{}\[\]]', re.DOTALL)
END_OF_BARE_VALUE = re.compile(rb"[,\]]")
CLOSING = {b"{": b"}", b"[": b"]"}


def decoded_row(content: bytes, where: str) -> dict[str, Any]:
    """One JSON object. orjson refuses bad UTF-8, lone surrogates, NaN, too deep nesting and trailing text, so none can
    slip through; keys that are there twice are looked for here, as it would take the last of them."""
    try:
        row = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as bad:
            raise UserError(f"{where}: byte {bad.start + 1} of the row is not UTF-8: save the file as UTF-8") from None
        reason = str(error).split(":")[0]
        raise UserError(f"{where}: not valid JSON ({reason}): write one JSON object a row") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: the row is {json_type(row)}: write one JSON object a row")
    try:
        # Every key ends with `":`; a text may hold the same, so another count asks for a closer look.
        num_colons = content.count(b'":') - content.count(b'\\":')
        if num_colons != num_keys(row):
            refuse_repeated_keys(content, where)
    except RecursionError:
        raise UserError(f"{where}: not valid JSON for a row (nested hundreds of levels deep): correct it") from None
    return row


def num_keys(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(num_keys(one) for one in value.values() if isinstance(one, dict | list))
    return sum(num_keys(one) for one in value if isinstance(one, dict | list))


def refuse_repeated_keys(content: bytes, where: str) -> None:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        unique = dict(found)
        if len(unique) != len(found):
            (key, _), *_ = (Counter(key for key, _ in found) - Counter(unique.keys())).items()
            raise UserError(f"{where}: field {key!r} is there twice: keep one of them")
        return unique

    json.loads(content, object_pairs_hook=pairs)


def lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes, int]]:
    """(line, content, end) of every line that is not blank."""
    end = 0
    for line, content in enumerate(file, start=1):
        end += len(content)
        if line == 1:
            content = content.removeprefix(BYTE_ORDER_MARK)
        if content.strip(WHITESPACE):
            yield line, content, end


class _ArrayScanner:
    """The unread part of a JSON array: `piece[position:]`, which starts at byte `offset` and on line `line`."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = file
        self.path = path
        self.piece = b""
        self.position = 0
        self.offset = 0
        self.line = 1

    def read_more(self) -> bool:
        """Append to the piece as much as is left of it, at least PIECE_BYTES: long rows are copied seldom."""
        more = self.file.read(max(PIECE_BYTES, len(self.piece) - self.position))
        self.piece = self.piece[self.position :] + more
        self.position = 0
        return bool(more)

    def advance(self, position: int) -> None:
        self.line += self.piece.count(b"\n", self.position, position)
        self.offset += position - self.position
        self.position = position

    def next_character(self) -> bytes:
        """The next character that is not white space, not consumed; empty at the end of the file."""
        while True:
            position = self.position
            while position < len(self.piece) and self.piece[position] in WHITESPACE:
                position += 1
            self.advance(position)
            if position < len(self.piece):
                return self.piece[position : position + 1]
            if not self.read_more():
                return b""

    def element(self) -> bytes:
        """The array element that starts here, to its closing bracket, or for a bare value to `,` or `]`."""
        if self.piece[self.position : self.position + 1] not in b"{[":
            return self._bare_value()
        open_brackets: list[bytes] = []  # the closing brackets that are still to come
        scanned = self.position
        while True:
            match = STRING_OR_BRACKET.search(self.piece, scanned)
            if match is None or self._is_cut(match):
                # Continue at the open string; before it nothing is left to find.
                scanned = (match.start() if match else len(self.piece)) - self.position
                if not self.read_more():
                    raise UserError(f"{self.path}, line {self.line}: the file ends inside this row: it is cut short")
                continue
            found, scanned = match.group(), match.end()
            if found in CLOSING:
                open_brackets.append(CLOSING[found])
            elif found in (b"}", b"]"):
                matches = found == open_brackets.pop()
                if not open_brackets or not matches:  # a mismatch goes to the decoder, which refuses it
                    return self._consumed(scanned)
            elif match.group(1) is None:  # so does a string that is not closed on its line
                return self._consumed(scanned)

    def _is_cut(self, match: "re.Match[bytes]") -> bool:
        """Whether the piece ends inside the string that `match` opens; a backslash may be its last byte."""
        return match.group().startswith(b'"') and match.group(1) is None and match.end() >= len(self.piece) - 1

    def _bare_value(self) -> bytes:
        while not (match := END_OF_BARE_VALUE.search(self.piece, self.position + 1)):
            if not self.read_more():
                return self._consumed(len(self.piece))
        return self._consumed(match.start())

    def _consumed(self, position: int) -> bytes:
        content = self.piece[self.position : position]
        self.advance(position)
        return content


def array_elements(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes, int]]:
    """(line, content, end) of every element of the array that is the whole file."""
    scanner = _ArrayScanner(file, path)
    scanner.read_more()
    if scanner.piece.startswith(BYTE_ORDER_MARK):
        scanner.advance(len(BYTE_ORDER_MARK))
    scanner.next_character()
    scanner.advance(scanner.position + 1)  # the opening bracket that file_format saw
    closed = scanner.next_character() == b"]"
    while not closed:
        if not scanner.next_character():
            raise UserError(
                f"{path}, line {scanner.line}: the JSON array is not closed with `]`: the file is cut short"
            )
        line = scanner.line
        content = scanner.element()
        yield line, content, scanner.offset
        separator = scanner.next_character()
        if separator not in (b",", b"]", b""):
            raise UserError(f"{path}, line {scanner.line}: expected `,` or `]` after a row, found {separator!r}")
        closed = separator == b"]"
        if separator == b",":
            scanner.advance(scanner.position + 1)
            if scanner.next_character() == b"]":
                raise UserError(f"{path}, line {scanner.line}: `,` before the end of the JSON array: remove it")
    scanner.advance(scanner.position + 1)
    if left := scanner.next_character():
        raise UserError(f"{path}, line {scanner.line}: {left!r} after the end of the JSON array: remove it")
