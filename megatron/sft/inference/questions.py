"""Questions of a data file: conversations up to the answer that is asked for, with that answer where the file has one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.sft.chat.conversations import FORMAT_FIELDS, Messages, RecordReader
from megatron.sft.data.sources import read_rows
from megatron.sft.runtime.errors import UserError

_PLACEHOLDER = "-"  # an answer for the row's reader, which asks for one


@dataclass(frozen=True)
class Question:
    """A conversation up to the answer that is asked for, and that answer where the data has one."""

    messages: Messages
    reference: str | None


def read_questions(path: Path, with_reference: bool) -> list[Question]:
    """The rows of a data file. A final assistant turn (or `output`) is the reference; `with_reference` asks for one."""
    reader = RecordReader()
    questions = []
    for row in read_rows(path):
        try:
            questions.append(_question(reader, row.fields, with_reference))
        except UserError as error:
            raise UserError(f"{path}, line {row.line}: {error}") from None
    return questions


def _question(reader: RecordReader, fields: dict[str, Any], with_reference: bool) -> Question:
    has_answer = True
    if not with_reference:
        fields, has_answer = _with_answer(dict(fields))
    conversation = reader.conversation(fields)
    return Question(conversation[:-1], conversation[-1]["content"] if has_answer else None)


def _with_answer(fields: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The row with an answer in any case, and whether it is the row's own."""
    for name, role in (("messages", "role"), ("conversations", "from")):
        turns = fields.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            if role not in turns[-1] or turns[-1][role] not in ("user", "human", "tool", "observation"):
                return fields, True
            text, answerer = ("content", "assistant") if role == "role" else ("value", "gpt")
            return {**fields, name: [*turns, {role: answerer, text: _PLACEHOLDER}]}, False
    for kind in ("instruction", "query", "prompt"):
        question, answer = FORMAT_FIELDS[kind]
        if isinstance(fields.get(question), str) and not fields.get(answer):
            return {**fields, answer: _PLACEHOLDER}, False
    return fields, True
