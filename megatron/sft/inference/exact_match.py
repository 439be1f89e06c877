"""Exact match of a model's answers on a data file: every question asked in every mode, compared word by word."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron.sft.inference.answer_file import Question, read_questions
from megatron.sft.inference.backends import Decoding
from megatron.sft.inference.chat_model import ChatModel
from megatron.sft.inference.scores import Score

THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class GradedAnswer:
    """One question, asked in one mode. final: what of `answer` was compared with `reference`, both as by `final_answer`."""

    question: str
    control: str
    reference: str
    answer: str
    final: str
    correct: bool
    finished: bool


@dataclass(frozen=True)
class ModeResult:
    """One mode's figures. exact_match: between 0 and 1. unfinished: answers cut at the token limit, which count as wrong."""

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

    Empty for thinking that never ends.
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
    """Ask the (first `limit`) questions of a file in every mode; prints each mode's figures and returns the result as JSON."""
    questions = read_questions(data, with_reference=True)[:limit]
    graded: list[GradedAnswer] = []
    modes: list[ModeResult] = []
    for control in controls:
        answers = ask(chat_model, questions, control, decoding)
        modes.append(mode_result(control, answers))
        graded += answers
        print(_mode_line(modes[-1], decoding, named=len(controls) > 1), flush=True)
    correct = sum(answer.correct for answer in graded)
    return {
        "data": str(data),
        "exact_match": correct / len(graded),
        "correct": correct,
        "asked": len(graded),
        "questions": len(questions),
        "modes": [asdict(mode) for mode in modes],
        "records": [asdict(answer) for answer in graded],
        "scores": [asdict(score) for score in _scores(data.stem, modes)],
    }


def ask(chat_model: ChatModel, questions: Sequence[Question], control: str, decoding: Decoding) -> list[GradedAnswer]:
    """Ask every question in one mode; answers in the order of the questions."""
    conversations = [question.messages for question in questions]
    # disable=None: no bar where stderr is not a terminal
    with tqdm(total=len(questions), desc=control or "answers", disable=None, leave=False) as bar:
        answers = chat_model.answers(conversations, control, decoding, lambda new: bar.update(len(new)))
    control_tokens = list(chat_model.tokenizer.get_added_vocab())
    graded = []
    for question, answer in zip(questions, answers, strict=True):
        asked = question.messages[-1]["content"]
        reference = final_answer(question.reference or "", control_tokens)
        final = final_answer(answer.text, control_tokens)
        is_correct = answer.finished and final == reference
        graded.append(GradedAnswer(asked, control, reference, answer.text, final, is_correct, answer.finished))
    return graded


def mode_result(control: str, answers: Sequence[GradedAnswer]) -> ModeResult:
    """The figures of one mode's answers, of which there must be at least one."""
    correct = sum(answer.correct for answer in answers)
    unfinished = sum(not answer.finished for answer in answers)
    return ModeResult(control, correct / len(answers), correct, len(answers), unfinished)


def _mode_line(mode: ModeResult, decoding: Decoding, named: bool) -> str:
    name = f"{mode.name}: " if named or mode.control else ""
    cut = f", {mode.unfinished:,} cut at {decoding.max_new_tokens} tokens" if mode.unfinished else ""
    return f"{name}exact match {100 * mode.exact_match:.1f} % ({mode.correct:,} of {mode.questions:,}{cut})"


def _scores(task: str, modes: Sequence[ModeResult]) -> list[Score]:
    """One score a mode, named after it unless the only mode is the free choice."""
    named = len(modes) > 1 or modes[0].control
    names = [f"exact match, {mode.name}" if named else "exact match" for mode in modes]
    return [
        Score(task, name, mode.exact_match, standard_error(mode), num_questions=mode.questions)
        for name, mode in zip(names, modes, strict=True)
    ]


def standard_error(mode: ModeResult) -> float:
    """Of a mode's exact match as a share of independent questions: sqrt(p (1 - p) / n)."""
    return float((mode.exact_match * (1 - mode.exact_match) / mode.questions) ** 0.5)
