"""Talk to a model: `bash scripts/6_generate.sh HF_DIR [PROMPT|FILE]`, which runs

python -m megatron.sft.generate HF_DIR "Sort these names: Tom Ada" --control "<think>"
"""

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from megatron.sft.chat.conversations import Messages
from megatron.sft.inference.answer_file import answer_file
from megatron.sft.inference.backends import Decoding
from megatron.sft.inference.chat_model import BACKENDS, DTYPES, ChatModel, check_control, load_chat_model
from megatron.sft.runtime.console import SIGNS
from megatron.sft.runtime.errors import OneLineParser, UserError, run

DATA_ENDINGS = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv")
CHAT_HELP = """\
/new              start a new conversation
/control <TOKEN>  begin answers with this token; without one, with none
/system <TEXT>    start a new conversation with this system prompt; without one, with the template's own
Ctrl-C            stop an answer
/quit or Ctrl-D   end"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    decoding = Decoding(**{field.name: getattr(arguments, field.name) for field in fields(Decoding)})
    _check(decoding, arguments.num_gpus)
    given: str | None = arguments.input
    is_file = given is not None and "\n" not in given and len(given) < 1000 and Path(given).is_file()
    if given is not None and not is_file and given.endswith(DATA_ENDINGS) and " " not in given:
        raise UserError(f"data file {given} does not exist: check the path (any other text is taken as a prompt)")
    model = load_chat_model(arguments.hf_dir, arguments.dtype, arguments.backend, arguments.seed, arguments.num_gpus)
    check_control(model.tokenizer, arguments.control)
    if given is None:
        chat(model, arguments.control, decoding, arguments.system)
    elif is_file:
        output = arguments.output or Path(given).with_name(Path(given).stem + ".answers.jsonl")
        settings = {"model": str(arguments.hf_dir.resolve()), "seed": arguments.seed, "control": arguments.control}
        settings |= {"system": arguments.system} if arguments.system else {}
        answer_file(model, Path(given), output, decoding, settings)
    else:
        stream_answer(model, [*_opening(arguments.system), {"role": "user", "content": given}], arguments.control, decoding)
    return 0


def stream_answer(chat_model: ChatModel, messages: Messages, control: str, decoding: Decoding) -> str:
    """Print the answer while it is made, on a terminal with SIGNS, and return it. `UserError` for a conversation longer than
    the model reads."""
    from tokenizers.decoders import DecodeStream

    print(control, end="", flush=True)
    stream, streamed = DecodeStream(skip_special_tokens=False), ""
    signs = SIGNS if sys.stdout.isatty() else {}

    def show(token: int) -> None:
        nonlocal streamed
        if token not in chat_model.stop_ids:
            piece = stream.step(chat_model.tokenizer.backend_tokenizer, token) or ""  # None within a character
            streamed += piece
            print(piece.translate(signs), end="", flush=True)

    [answer] = chat_model.generate([chat_model.prompt(messages, control)], decoding, show)
    rest = answer.text[len(streamed) :]  # of a character that the limit cut
    print(rest.translate(signs) + ("" if answer.finished else " [cut at MAX_NEW_TOKENS]"), flush=True)
    return control + answer.text


def _opening(system: str) -> Messages:
    return [{"role": "system", "content": system}] if system else []


@contextlib.contextmanager
def _quiet_terminal() -> Iterator[None]:
    """While open, what is typed is not shown, and forgotten: it would stand in the middle of an answer."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcflush(sys.stdin, termios.TCIFLUSH)
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def chat(chat_model: ChatModel, control: str, decoding: Decoding, system: str = "") -> None:
    """A conversation on the terminal, until the input ends. A question without an answer is forgotten."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        print(CHAT_HELP)
    messages = _opening(system)
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        command, _, token = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/new":
                messages = _opening(system)
            elif command == "/system":
                system = token.strip()
                messages = _opening(system)
            elif command == "/control":
                check_control(chat_model.tokenizer, token.strip())
                control = token.strip()
            elif re.fullmatch(r"/[a-z]+", command):
                print(f"{command} is not a command:\n{CHAT_HELP}")
            elif line:
                asked = [*messages, {"role": "user", "content": line}]
                with _quiet_terminal():
                    answer = stream_answer(chat_model, asked, control, decoding)
                messages = [*asked, {"role": "assistant", "content": answer}]
        except KeyboardInterrupt:
            print(" [stopped: the question and this answer are forgotten]")
        except UserError as error:
            print(error)


def _check(decoding: Decoding, num_gpus: int) -> None:
    for name, value, least in (
        ("MAX_NEW_TOKENS", decoding.max_new_tokens, 1),
        ("BATCH_SIZE", decoding.batch_size, 1),
        ("TEMPERATURE", decoding.temperature, 0),
        ("TOP_K", decoding.top_k, 0),
        ("NUM_GPUS", num_gpus, 1),
    ):
        if value < least:
            raise UserError(f"{name}={value} is too small: give at least {least}")
    if not 0 < decoding.top_p <= 1:
        raise UserError(f"TOP_P={decoding.top_p} is not a share of the probability: give more than 0, at most 1")
    if not decoding.temperature and (decoding.top_p < 1 or decoding.top_k):
        raise UserError("TOP_P and TOP_K change nothing at TEMPERATURE=0: give a temperature, such as 0.6")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="generate", description="Talk to a model, or let it answer a file.")
    parser.add_argument("hf_dir", type=Path)
    parser.add_argument("input", nargs="?", help="a question, or a data file; without it a chat on the terminal")
    parser.add_argument("--control", default="", help="text that every answer begins with, such as <think> or <short>")
    parser.add_argument("--system", default="", help="system prompt of every conversation without one")
    parser.add_argument("--max-new-tokens", type=int, default=Decoding.max_new_tokens)
    parser.add_argument("--temperature", type=float, default=Decoding.temperature)
    parser.add_argument("--top-p", type=float, default=Decoding.top_p, help="draw from the likeliest of this share")
    parser.add_argument("--top-k", type=int, default=Decoding.top_k, help="draw from this many tokens; 0 is all")
    parser.add_argument("--batch-size", type=int, default=Decoding.batch_size)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: the folder's")
    parser.add_argument("--output", type=Path, help="of a data file; default <data>.answers.jsonl next to it")
    parser.add_argument("--seed", type=int, default=1234, help="of sampling at a temperature above 0")
    parser.add_argument("--backend", default=BACKENDS[0], help=" or ".join(BACKENDS))
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs over which vLLM splits the model")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
