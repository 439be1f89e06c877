"""Which process of a run this is, and printing from rank 0 alone.

RANK in the environment does not make a run: every pod of a PyTorchJob or of PAI-DLC has it.
"""

import os
import re
import shutil
import sys

from megatron.sft.runtime.signals import LAUNCHER_PID

_RUN_ID = "TORCHELASTIC_RUN_ID"  # torchrun, ours or torch's, sets it for the processes that it starts
_OF_A_RUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK")

_line_is_open = False
_GREY, _BOLD, _RESET = "\x1b[90m", "\x1b[1m", "\x1b[0m"


def in_a_run() -> bool:
    """Whether torchrun started this process as one of a run."""
    return _RUN_ID in os.environ and "RANK" in os.environ


def leave_foreign_run(under_torchrun: bool) -> None:
    """Forget the ranks in the environment unless `megatron.sft.launch` started this process, or torchrun did and this is a
    command for it (`under_torchrun`)."""
    if os.environ.get(LAUNCHER_PID) == str(os.getppid()) or (under_torchrun and in_a_run()):
        return
    for name in list(os.environ):
        if name in _OF_A_RUN or name.startswith("TORCHELASTIC_"):
            del os.environ[name]


def is_rank_0() -> bool:
    """True on the process that prints and writes for all; also outside a run."""
    return not in_a_run() or int(os.environ["RANK"]) == 0


def print_rank_0(message: str) -> None:
    """Print and flush a line, from rank 0 alone."""
    if is_rank_0():
        end_line()
        print(message, flush=True)


def rewrite_rank_0(message: str) -> None:
    """On a terminal, print a line in place of the last one from here; elsewhere, print it as any other.

    Whatever is printed next keeps the line that stands there.
    """
    global _line_is_open
    if not is_rank_0() or not _on_terminal():
        print_rank_0(message)
        return
    width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be rewritten
    print(f"\r\033[K{colored(message[:width])}", end="", flush=True)
    _line_is_open = True


def _on_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def colored(message: str) -> str:
    """A line of metrics with its loss in bold and its bars in grey, on a terminal that is not asked for NO_COLOR."""
    if not _on_terminal() or os.environ.get("NO_COLOR"):
        return message
    return re.sub(r"(?<=\| )loss \S+", rf"{_BOLD}\g<0>{_RESET}", message).replace(" | ", f"{_GREY} | {_RESET}")


def end_line() -> None:
    """Keep the line that would have been rewritten."""
    global _line_is_open
    if _line_is_open:
        print(flush=True)
    _line_is_open = False
