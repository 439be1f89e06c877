"""Talk to a model: `bash scripts/6_generate.sh HF_DIR [PROMPT|FILE]`, which runs

python -m megatron.sft.generate HF_DIR "Sort these names: Tom Ada" --control "<think>"
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron.sft.answers import DTYPES, ChatModel, Decoding, load_chat_model, read_questions
from megatron.sft.data.conversations import Conversation
from megatron.sft.data.sources import read_rows
from megatron.sft.errors import OneLineParser, UserError, run
from megatron.sft.manifest import write_text

DATA_ENDINGS = (".json", ".jsonl")
CHAT_HELP = (
    "/new starts again, /control <TOKEN> begins answers with it (/control alone: with none), /quit or Ctrl-D ends"
)


class TextStream:
    """Prints an answer while it is made. transformers calls `put` with the prompt, then with every new token."""

    def __init__(self, chat_model: ChatModel) -> None:
        self.chat_model = chat_model
        self.ids: list[int] | None = None
        self.printed = ""

    def put(self, value: Any) -> None:
        if self.ids is None:
            self.ids = []  # the prompt
            return
        self.ids += value.reshape(-1).tolist()
        text, _ = self.chat_model.text_of(self.ids)
        if not text.endswith("\ufffd"):  # the first bytes of a character
            print(text[len(self.printed) :], end="", flush=True)
            self.printed = text

    def end(self) -> None:
        text, finished = self.chat_model.text_of(self.ids or [])
        print(text[len(self.printed) :] + ("" if finished else " [cut at MAX_NEW_TOKENS]"), flush=True)


def main() -> None:
    arguments = _parse()
    decoding = Decoding(arguments.max_new_tokens, arguments.temperature, arguments.batch_size)
    _check(arguments, decoding)
    given: str | None = arguments.input
    is_file = given is not None and "\n" not in given and len(given) < 1000 and Path(given).is_file()
    if given is not None and not is_file and given.endswith(DATA_ENDINGS) and " " not in given:
        raise UserError(f"data file {given} does not exist: check the path (any other text is taken as a prompt)")
    chat_model = load_chat_model(arguments.hf_dir, arguments.dtype)
    chat_model.check_control(arguments.control)
    _seed(arguments.seed)
    if given is None:
        chat(chat_model, arguments.control, decoding)
    elif is_file:
        output = arguments.output or Path(given).with_name(Path(given).stem + ".answers.jsonl")
        answer_file(chat_model, Path(given), output, arguments.control, decoding)
    else:
        stream_answer(chat_model, [{"role": "user", "content": given}], arguments.control, decoding)


def stream_answer(chat_model: ChatModel, messages: Conversation, control: str, decoding: Decoding) -> str:
    """Print the answer while it is made, and return it."""
    print(control, end="", flush=True)
    prompt = chat_model.prompt(messages, control)
    [(text, _)] = chat_model.generate([prompt], decoding, TextStream(chat_model))
    return control + text


def chat(chat_model: ChatModel, control: str, decoding: Decoding) -> None:
    """A conversation on the terminal, until the input ends."""
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        print(CHAT_HELP)
    messages: Conversation = []
    while True:
        try:
            line = input("> " if on_terminal else "").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/new":
            messages = []
        elif command == "/control":
            control = _changed_control(chat_model, control, rest.strip())
        elif line:
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": stream_answer(chat_model, messages, control, decoding)})


def _changed_control(chat_model: ChatModel, control: str, wanted: str) -> str:
    try:
        chat_model.check_control(wanted)
    except UserError as error:
        print(error)
        return control
    return wanted


def answer_file(chat_model: ChatModel, data: Path, output: Path, control: str, decoding: Decoding) -> None:
    """Write the rows of `data` as JSON lines with an `answer` more, and `finished` false where the limit cut it."""
    questions = read_questions(data, with_reference=False)
    if output.resolve() == data.resolve():
        raise UserError(f"OUTPUT {output} is the data file itself: give another name")
    done = 0

    def progress(num_answers: int) -> None:
        nonlocal done
        done += num_answers
        print(f"answered {done:,} of {len(questions):,}", file=sys.stderr, flush=True)

    answers = chat_model.answers([question.messages for question in questions], control, decoding, progress)
    rows = [
        {**row.fields, "answer": answer.text, "finished": answer.finished}
        for row, answer in zip(read_rows(data), answers, strict=True)
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    num_cut = sum(not answer.finished for answer in answers)
    print(f"wrote {len(rows):,} answers to {output}, {num_cut:,} of them cut at {decoding.max_new_tokens} tokens")


def _check(arguments: argparse.Namespace, decoding: Decoding) -> None:
    if arguments.backend != "transformers":
        raise UserError(f"backend {arguments.backend!r} is not there yet: leave BACKEND out to use transformers")
    for name, value, least in (
        ("MAX_NEW_TOKENS", decoding.max_new_tokens, 1),
        ("BATCH_SIZE", decoding.batch_size, 1),
        ("TEMPERATURE", decoding.temperature, 0),
    ):
        if value < least:
            raise UserError(f"{name}={value} is too small: give at least {least}")


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _parse() -> argparse.Namespace:
    parser = OneLineParser(prog="generate", description="Talk to a model, or let it answer a file.")
    parser.add_argument("hf_dir", type=Path)
    parser.add_argument("input", nargs="?", help="a question, or a data file; without it a chat on the terminal")
    parser.add_argument("--control", default="", help="text that every answer begins with, such as <think> or <short>")
    parser.add_argument("--max-new-tokens", type=int, default=Decoding.max_new_tokens)
    parser.add_argument("--temperature", type=float, default=Decoding.temperature)
    parser.add_argument("--batch-size", type=int, default=Decoding.batch_size)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: as the folder says")
    parser.add_argument("--output", type=Path, help="of a data file; default <data>.answers.jsonl beside it")
    parser.add_argument("--seed", type=int, default=1234, help="of sampling at a temperature above 0")
    parser.add_argument("--backend", default="transformers")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
