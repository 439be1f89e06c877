"""Lets a model answer the questions of a data file. Answers are kept as they come, so that an interrupted run continues."""

import contextlib
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.sft.chat.conversations import Messages, RecordReader
from megatron.sft.data.sources import read_records
from megatron.sft.inference.backends import Decoding
from megatron.sft.inference.chat_model import Answer, ChatModel
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import sha256_of_file, sha256_of_text, write_text


@dataclass(frozen=True)
class Question:
    """A conversation up to the answer that is asked for. reference: that answer, where the data has it."""

    messages: Messages
    reference: str | None


def read_questions(path: Path, with_reference: bool) -> list[Question]:
    """The records of a data file, in order. The reference is a final assistant turn, or `output` and its like.

    `UserError` with the line for a record that cannot be read or, if `with_reference`, has no reference.
    """
    # What is not trained need not be known, but a reference must be an answer.
    reader = RecordReader(ignores_unknown=True, needs_answer=with_reference)
    questions = []
    for record in read_records(path):
        try:
            messages = reader.conversation(record.fields)
            has_answer = messages[-1]["role"] == "assistant"
            if with_reference and not has_answer:
                raise UserError(f"the last turn is {messages[-1]['role']!r}, so there is no reference: end with an answer")
        except UserError as error:
            raise UserError(f"{record.place}: {error}") from None
        questions.append(Question(messages[:-1], messages[-1]["content"]) if has_answer else Question(messages, None))
    return questions


def _with_system(messages: Messages, system: str) -> Messages:
    """The messages after a system prompt, unless they have one."""
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def answer_file(chat_model: ChatModel, data: Path, output: Path, decoding: Decoding, settings: dict[str, Any]) -> None:
    """Write the records of `data`, in order, as JSON lines with two more fields: `answer`, and `finished`, which is false where
    the token limit cut the answer.

    settings: what else decides the answers: `control`, the model, the seed. With other ones nothing that was kept is used.
    """
    questions = read_questions(data, with_reference=False)
    if output.resolve() == data.resolve():
        raise UserError(f"OUTPUT {output} is the data file itself: give another name")
    output.parent.mkdir(parents=True, exist_ok=True)
    fingerprint = sha256_of_text(json.dumps([sha256_of_file(data), settings, asdict(decoding)]))
    unfinished = output.with_name(f".{output.name}.unfinished")
    answers = {index: Answer(text, finished) for index, text, finished in kept_values(unfinished, fingerprint)[1:]}
    # Written again even if nothing is new: after a line that was cut off nothing can be appended.
    write_text(unfinished, _json_lines([{"fingerprint": fingerprint}, *_numbered(answers)]))
    if answers:
        print(f"continuing an interrupted run after {len(answers):,} answers", file=sys.stderr, flush=True)
    missing = [index for index in range(len(questions)) if index not in answers]

    def progress(new: dict[int, Answer]) -> None:
        added = {missing[index]: answer for index, answer in new.items()}
        answers.update(added)
        with open(unfinished, "a", encoding="utf-8") as file:
            file.write(_json_lines(_numbered(added)))
        print(f"answered {len(answers):,} of {len(questions):,}", file=sys.stderr, flush=True)

    if missing:
        conversations = [_with_system(questions[index].messages, str(settings.get("system", ""))) for index in missing]
        chat_model.answers(conversations, str(settings["control"]), decoding, progress)
    answered = [
        {**record.fields, "answer": answers[index].text, "finished": answers[index].finished}
        for index, record in enumerate(read_records(data))
    ]
    write_text(output, _json_lines(answered))
    unfinished.unlink()
    num_cut = sum(not answer.finished for answer in answers.values())
    print(f"wrote {len(answered):,} answers to {output}, {num_cut:,} of them cut at {decoding.max_new_tokens} tokens")


def _numbered(answers: dict[int, Answer]) -> list[list[Any]]:
    return [[index, answer.text, answer.finished] for index, answer in answers.items()]


def _json_lines(values: Iterable[Any]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def kept_values(path: Path, fingerprint: str) -> list[Any]:
    """The JSON values of a file, each followed by a newline, if the first is an object with this `fingerprint`; else none.

    A last value that was cut off (killed process, full disk) is dropped.
    """
    values: list[Any] = []
    with contextlib.suppress(OSError, ValueError):
        text, start = path.read_text(encoding="utf-8", errors="replace"), 0
        while start < len(text):
            value, end = json.JSONDecoder().raw_decode(text, start)
            values.append(value)
            start = end + 1
    is_of_these = bool(values) and isinstance(values[0], dict) and values[0].get("fingerprint") == fingerprint
    return values if is_of_these else []
