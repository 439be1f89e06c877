"""How this project speaks to its user when something is wrong: one line with the thing, its value and the next step."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """Something that the user can put right. The message names the thing, its value and the next step."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaint is a `UserError` of one line, without a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (-h explains the options)")


def first_line(error: BaseException) -> str:
    """What another library says of its error, without the advice that may follow on more lines."""
    return str(error).strip().partition("\n")[0]


def cause_of(error: BaseException) -> str:
    """One line that names the cause: `first_line`, after the error's type where the text alone may say too little."""
    says_enough = isinstance(error, UserError | OSError) or type(error) is RuntimeError
    return first_line(error) if says_enough else f"{type(error).__name__}: {first_line(error)}"


def fail(message: str) -> NoReturn:
    """Print `error: message` on stderr and end the process with status 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def leave_message(message: str) -> None:
    """Say why this process ends: `error: message` on stderr, or in a multi-process run in the error file that torchrun gave
    it, of which `megatron.sft.launch` prints one.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        print(f"error: {message}", file=sys.stderr, flush=True)
        return
    content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
    Path(error_file).write_text(json.dumps(content))


def run(main: Callable[[], int]) -> NoReturn:
    """Call a command's `main` and end the process with the status that it returns.

    A `UserError` becomes one line and exit status 2, any other error keeps its trace. In a multi-process run mostly every rank
    finds the same error; it is printed once.
    """
    try:
        status = main()
    except UserError as error:
        leave_message(str(error))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(status)
