"""Errors as users see them: one line with the thing, its value and the next step."""

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron.sft.runtime import console
from megatron.sft.runtime.ranks import leave_foreign_run


class UserError(Exception):
    """Something that the user can fix. The message has the thing, its value and the next step, on one line."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are a `UserError` of one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (-h explains the options)")


def first_line(error: BaseException) -> str:
    """The first line of an error's text; other libraries put advice on the lines after it."""
    return str(error).strip().partition("\n")[0]


def cause_of(error: BaseException) -> str:
    """The first line of an error's text, after its type where that adds something (not `UserError`, `OSError`)."""
    is_clear = isinstance(error, UserError | OSError) or type(error) is RuntimeError
    return first_line(error) if is_clear else f"{type(error).__name__}: {first_line(error)}"


def fail(message: str) -> NoReturn:
    """Print `error: message` on stderr and end the process with status 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def leave_message(message: str) -> None:
    """Report why this process ends: `error: message` on stderr or, in a multi-process run, in the error file that torchrun gave
    it. `megatron.sft.launch` prints one of those files.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        print(f"error: {message}", file=sys.stderr, flush=True)
        return
    content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
    # Whole or not at all: the launcher reads it, and may end this process while it writes.
    staged = Path(f"{error_file}.{os.getpid()}.tmp")
    staged.write_text(json.dumps(content))
    staged.replace(error_file)


def run(main: Callable[[], int], under_torchrun: bool = False) -> NoReturn:
    """Call a command's `main` and exit with the status that it returns.

    A `UserError` becomes one line and status 2, Ctrl-C status 130; any other error keeps its trace. In a multi-process run
    every rank usually finds the same error, which is printed once. A terminal, pipe or log that is gone does not end it.
    under_torchrun: torch's own torchrun may start the command.
    """
    leave_foreign_run(under_torchrun)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal of another encoding shows ? for what it lacks; stderr has replacements by default.
        sys.stdout.reconfigure(errors="replace")
    console.protect()
    try:
        status = main()
    except UserError as error:
        leave_message(str(error))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(status)
