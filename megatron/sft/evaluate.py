"""Exact match of a model's answers on a data file: `bash scripts/7_evaluate.sh HF_DIR FILE`, which runs

python -m megatron.sft.evaluate HF_DIR heldout.json --control "<short>" --control "<think>"
"""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.sft.answers import DTYPES, Answer, ChatModel, Decoding, Question, load_chat_model, read_questions
from megatron.sft.errors import OneLineParser, UserError, run
from megatron.sft.manifest import write_json

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


def make_record(question: Question, control: str, answer: Answer, control_tokens: Sequence[str]) -> Record:
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


def ask(chat_model: ChatModel, questions: Sequence[Question], control: str, decoding: Decoding) -> list[Record]:
    """Ask every question in one mode."""
    done = 0

    def progress(num_answers: int) -> None:
        nonlocal done
        done += num_answers
        if sys.stderr.isatty():
            print(f"\r{control or 'answers'} {done:,} of {len(questions):,} ", end="", file=sys.stderr, flush=True)

    answers = chat_model.answers([question.messages for question in questions], control, decoding, progress)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    control_tokens = list(chat_model.tokenizer.get_added_vocab())
    return [make_record(q, control, answer, control_tokens) for q, answer in zip(questions, answers, strict=True)]


def main() -> None:
    arguments = _parse()
    data: Path = arguments.data
    if not data.is_file():
        raise UserError(
            f"{data} is no file: give a data file of instruction and output (or messages) rows, which is answered and "
            "compared word by word; benchmarks by name do not work yet"
        )
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"LIMIT={arguments.limit} leaves no question: give at least 1")
    started = time.monotonic()
    questions = read_questions(data, with_reference=True)[: arguments.limit]
    chat_model = load_chat_model(arguments.hf_dir, arguments.dtype)
    controls = list(dict.fromkeys(arguments.control or [""]))
    for control in controls:
        chat_model.check_control(control)
    decoding = Decoding(arguments.max_new_tokens, 0.0, arguments.batch_size)
    records: list[Record] = []
    modes: list[ModeResult] = []
    for control in controls:
        asked = ask(chat_model, questions, control, decoding)
        modes.append(mode_result(control, asked))
        records += asked
        print(_line(modes[-1], decoding))
    output = arguments.output or Path("outputs/evaluations") / f"{arguments.hf_dir.resolve().name}-{data.stem}.json"
    _write(output, arguments.hf_dir, data, modes, records, time.monotonic() - started)


def _line(mode: ModeResult, decoding: Decoding) -> str:
    cut = f", {mode.unfinished:,} cut at {decoding.max_new_tokens} tokens" if mode.unfinished else ""
    name = mode.control or "free choice"
    return f"{name}: exact match {100 * mode.exact_match:.1f} % ({mode.correct:,} of {mode.questions:,}{cut})"


def _write(
    output: Path, model: Path, data: Path, modes: Sequence[ModeResult], records: Sequence[Record], seconds: float
) -> None:
    correct = sum(record.correct for record in records)
    output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "model": str(model),
        "data": str(data),
        "exact_match": correct / len(records),
        "correct": correct,
        "asked": len(records),
        "questions": modes[0].questions,
        "seconds": round(seconds, 1),
        "modes": [asdict(mode) for mode in modes],
        "records": [asdict(record) for record in records],
    }
    write_json(output, result)
    print(
        f"exact match {100 * correct / len(records):.1f} % ({correct:,} of {len(records):,}) in {seconds:.0f} s, "
        f"every answer in {output}"
    )


def _parse() -> argparse.Namespace:
    parser = OneLineParser(prog="evaluate", description="Exact match of a model's answers on a data file.")
    parser.add_argument("hf_dir", type=Path)
    parser.add_argument("data", type=Path, help="instruction/output or messages rows; the last answer is the reference")
    parser.add_argument(
        "--control", action="append", help="ask with this token first, such as <think>; may be repeated"
    )
    parser.add_argument("--limit", type=int, help="only the first questions")
    parser.add_argument("--max-new-tokens", type=int, default=Decoding.max_new_tokens)
    parser.add_argument("--batch-size", type=int, default=Decoding.batch_size)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: as the folder says")
    parser.add_argument("--output", type=Path, help="default outputs/evaluations/<model>-<data>.json")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
