"""How this project speaks to its user when something is wrong: one line with the thing, its value and the next step."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something that the user can put right. The message names the thing, its value and the next step."""


def fail(message: str) -> NoReturn:
    """Print `error: message` on stderr and end the process with status 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def run(main: Callable[[], None]) -> None:
    """Call an entry module's `main`. A `UserError` becomes one line and exit status 2, any other error keeps its trace.

    In a multi-process run every rank finds the same error; only local rank 0 prints it.
    """
    try:
        main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            fail(str(error))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
