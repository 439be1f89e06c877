"""Which of a run's processes this is, and printing from the first of them."""

import os


def is_first() -> bool:
    """True on the process that prints and writes for all."""
    return int(os.environ.get("RANK", "0")) == 0


def say(message: str) -> None:
    """Print a line from the first process only."""
    if is_first():
        print(message, flush=True)
