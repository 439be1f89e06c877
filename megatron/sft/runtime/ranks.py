"""Which of a run's processes this is, and printing from the first of them."""

import os


def is_rank_0() -> bool:
    """True on the process that prints and writes for all."""
    return int(os.environ.get("RANK", "0")) == 0


def print_rank_0(message: str) -> None:
    """Print a line from the first process only."""
    if is_rank_0():
        print(message, flush=True)
