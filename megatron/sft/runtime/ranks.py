"""Whether this process is rank 0 of its run, as torchrun's environment says, and printing from rank 0 alone."""

import os


def is_rank_0() -> bool:
    """True on the process that prints and writes for all; also without torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def print_rank_0(message: str) -> None:
    """Print and flush a line, from rank 0 alone."""
    if is_rank_0():
        print(message, flush=True)
