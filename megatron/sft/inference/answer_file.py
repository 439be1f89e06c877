"""Lets a model answer a data file. What is answered is kept as it comes, so that a run that was cut off goes on there."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.sft.data.sources import read_records
from megatron.sft.inference.chat_model import Answer, ChatModel
from megatron.sft.inference.decoding import Decoding
from megatron.sft.inference.questions import read_questions
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import sha256_of_file, sha256_of_text, write_text


@dataclass(frozen=True)
class Kept:
    """Answers of an unfinished run: a first line that says of what, then one answer a line with its question's number."""

    path: Path
    fingerprint: str

    def read(self) -> dict[int, Answer]:
        """The answers that are there, none if they are of other data or settings. A line that was cut off is dropped."""
        answers: dict[int, Answer] = {}
        try:
            first, *lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            if json.loads(first) == {"fingerprint": self.fingerprint}:
                for line in lines:
                    if line.endswith("\n"):
                        number, text, finished = json.loads(line)
                        answers[number] = Answer(text, finished)
        except (OSError, ValueError):
            pass
        text = json.dumps({"fingerprint": self.fingerprint}) + "\n"
        write_text(self.path, text + "".join(map(_line, answers.items())))
        return answers

    def add(self, answers: dict[int, Answer]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(map(_line, answers.items())))


def _line(item: tuple[int, Answer]) -> str:
    number, answer = item
    return json.dumps([number, answer.text, answer.finished], ensure_ascii=False) + "\n"


def answer_file(chat_model: ChatModel, data: Path, output: Path, decoding: Decoding, settings: dict[str, Any]) -> None:
    """Write the rows of `data`, in their order, as JSON lines with an `answer` more, and `finished` false where the limit
    cut it. settings: what decides the answers beside the data and `decoding`; `control` among them."""
    questions = read_questions(data, with_reference=False)
    if output.resolve() == data.resolve():
        raise UserError(f"OUTPUT {output} is the data file itself: give another name")
    output.parent.mkdir(parents=True, exist_ok=True)
    fingerprint = sha256_of_text(json.dumps([sha256_of_file(data), settings, asdict(decoding)]))
    kept = Kept(output.with_name(f".{output.name}.unfinished"), fingerprint)
    answers = kept.read()
    if answers:
        print(f"goes on after {len(answers):,} answers of a run that did not finish", file=sys.stderr, flush=True)
    missing = [number for number in range(len(questions)) if number not in answers]

    def progress(new: dict[int, Answer]) -> None:
        numbered = {missing[place]: answer for place, answer in new.items()}
        answers.update(numbered)
        kept.add(numbered)
        print(f"answered {len(answers):,} of {len(questions):,}", file=sys.stderr, flush=True)

    if missing:
        conversations = [questions[number].messages for number in missing]
        chat_model.answers(conversations, str(settings["control"]), decoding, progress)
    rows = [
        {**row.fields, "answer": answers[number].text, "finished": answers[number].finished}
        for number, row in enumerate(read_records(data))
    ]
    write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    kept.path.unlink()
    num_cut = sum(not answer.finished for answer in answers.values())
    print(f"wrote {len(rows):,} answers to {output}, {num_cut:,} of them cut at {decoding.max_new_tokens} tokens")
