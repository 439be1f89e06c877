"""Exact match of a model's answers on a data file of one's own: every question asked in every mode, compared word by word."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.sft.inference.chat_model import Answer, ChatModel
from megatron.sft.inference.decoding import Decoding
from megatron.sft.inference.questions import Question, read_questions
from megatron.sft.inference.scores import Score

THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class Record:
    """One question, asked in one mode."""

    question: str
    control: str
    reference: str
    answer: str
    final: str
    correct: bool
    finished: bool


@dataclass(frozen=True)
class ModeResult:
    """One mode's figures. `unfinished` answers were cut at the token limit and count as wrong."""

    control: str
    exact_match: float
    correct: int
    questions: int
    unfinished: int

    @property
    def name(self) -> str:
        return self.control or "free choice"


def final_answer(text: str, control_tokens: Iterable[str] = ()) -> str:
    """What comes after the last `</think>`, without control tokens, runs of white space made one space.

    Thinking that never ends has no final answer.
    """
    if END_THINK in text:
        text = text.rpartition(END_THINK)[2]
    elif THINK in text:
        return ""
    for token in control_tokens:
        text = text.replace(token, " ")
    return " ".join(text.split())


def exact_match(
    chat_model: ChatModel, data: Path, controls: Sequence[str], decoding: Decoding, limit: int | None
) -> dict[str, Any]:
    """Ask the (first `limit`) questions of a file in every mode; says each mode's figures, and returns all of it."""
    questions = read_questions(data, with_reference=True)[:limit]
    records: list[Record] = []
    modes: list[ModeResult] = []
    for control in controls:
        asked = ask(chat_model, questions, control, decoding)
        modes.append(mode_result(control, asked))
        records += asked
        print(_line(modes[-1], decoding), flush=True)
    correct = sum(record.correct for record in records)
    return {
        "data": str(data),
        "exact_match": correct / len(records),
        "correct": correct,
        "asked": len(records),
        "questions": len(questions),
        "modes": [asdict(mode) for mode in modes],
        "records": [asdict(record) for record in records],
        "scores": [asdict(score) for score in _scores(data.stem, modes)],
    }


def ask(chat_model: ChatModel, questions: Sequence[Question], control: str, decoding: Decoding) -> list[Record]:
    """Ask every question in one mode."""
    done = 0

    def progress(new: dict[int, Answer]) -> None:
        nonlocal done
        done += len(new)
        if sys.stderr.isatty():
            print(f"\r{control or 'answers'} {done:,} of {len(questions):,} ", end="", file=sys.stderr, flush=True)

    answers = chat_model.answers([question.messages for question in questions], control, decoding, progress)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    control_tokens = list(chat_model.tokenizer.get_added_vocab())
    return [_record(q, control, answer, control_tokens) for q, answer in zip(questions, answers, strict=True)]


def _record(question: Question, control: str, answer: Answer, control_tokens: Sequence[str]) -> Record:
    reference = final_answer(question.reference or "", control_tokens)
    final = final_answer(answer.text, control_tokens)
    return Record(
        question=question.messages[-1]["content"],
        control=control,
        reference=reference,
        answer=answer.text,
        final=final,
        correct=answer.finished and final == reference,
        finished=answer.finished,
    )


def mode_result(control: str, records: Sequence[Record]) -> ModeResult:
    """The figures of one mode's records."""
    correct = sum(record.correct for record in records)
    unfinished = sum(not record.finished for record in records)
    return ModeResult(control, correct / len(records), correct, len(records), unfinished)


def _line(mode: ModeResult, decoding: Decoding) -> str:
    cut = f", {mode.unfinished:,} cut at {decoding.max_new_tokens} tokens" if mode.unfinished else ""
    return f"{mode.name}: exact match {100 * mode.exact_match:.1f} % ({mode.correct:,} of {mode.questions:,}{cut})"


def _scores(task: str, modes: Sequence[ModeResult]) -> list[Score]:
    several = len(modes) > 1 or modes[0].control
    return [
        Score(task, "exact match" + (f", {mode.name}" if several else ""), mode.exact_match, _error(mode))
        for mode in modes
    ]


def _error(mode: ModeResult) -> float:
    """Standard error of a share."""
    return float((mode.exact_match * (1 - mode.exact_match) / mode.questions) ** 0.5)
