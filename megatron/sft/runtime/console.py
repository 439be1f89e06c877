"""Standard output and error that never end a process: their reader may be gone, their disk full, their descriptor closed.

`| tee log` and Ctrl-C take the reader away while a run saves; `| head` does it after ten lines. From the first write that fails
on, lines go to a file instead (`fall_back_to`), or nowhere if there is none.
"""

import contextlib
import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, TextIO

FILE = "console.log"  # in a run's folder
# Of texts from elsewhere, what would command a terminal (move its cursor, hide text, turn a line around), for `str.translate`:
# control characters that have a picture in Unicode, those that have none, and changes of the direction of writing.
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {0x7F: "␡"}
_NUMBERS = {code: f"⟨U+{code:04X}⟩" for code in (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
SIGNS = _PICTURES | _NUMBERS
_fallback: Path | None = None


class _Console:
    """Delegates to a text stream; a write or flush that fails moves the stream's descriptor to the fallback and is repeated."""

    def __init__(self, stream: TextIO, descriptor: int, lost: bool) -> None:
        self._stream, self._descriptor, self.lost = stream, descriptor, lost

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:
            self.move(error)
            with contextlib.suppress(OSError, ValueError):
                return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.move(error)
            try:
                self._stream.flush()  # what could not be written is still in the buffer
            except (OSError, ValueError):  # the fallback's disk is full too
                self._point_to(Path(os.devnull))
                with contextlib.suppress(OSError, ValueError):
                    self._stream.flush()

    def move(self, error: Exception | None = None) -> None:
        """Point the descriptor, which child processes inherit as well, to the fallback."""
        first, self.lost = not self.lost, True
        if not self._point_to(_fallback or Path(os.devnull)):
            self._point_to(Path(os.devnull))
        elif _fallback is not None and (first or error is None):
            name = "standard output" if self._descriptor == 1 else "standard error"
            reason = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
            with contextlib.suppress(OSError):
                os.write(self._descriptor, f"note: {name} is gone{reason}: its lines are here from now on\n".encode())

    def _point_to(self, path: Path) -> bool:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            target = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError:
            return False
        os.dup2(target, self._descriptor)
        os.close(target)
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    # A `with` or a `for` over a stream looks these up on the class.
    def __iter__(self) -> Any:
        return iter(self._stream)


def say_next(*lines: str) -> None:
    """Print what a user may do next; nothing in a script that takes all steps itself, as the quickstart does (SAY_NEXT=0)."""
    if os.environ.get("SAY_NEXT", "1") != "0":
        print("\n".join(lines), flush=True)


def protect() -> None:
    """Make this process's standard output and error unable to end it. Safe to call more than once."""
    for descriptor, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        closed = False
        try:
            os.fstat(descriptor)
        except OSError:
            closed = True
            # Otherwise the next file that is opened would get this number, and every print would go into it.
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
        if descriptor and not os.get_blocking(descriptor):
            # Node.js leaves terminals and pipes so, and Python loses what a full one does not take at once.
            os.set_blocking(descriptor, True)
        stream: IO[str] | None = getattr(sys, name)
        if descriptor == 0 or isinstance(stream, _Console):
            continue
        if stream is None:
            stream = os.fdopen(descriptor, "w", encoding="utf-8", errors="replace", closefd=False)
        elif not _has_descriptor(stream, descriptor):
            continue  # captured by a test, or by a notebook
        elif isinstance(stream, TextIOWrapper) and stream.write_through:
            # PYTHONUNBUFFERED, which images set, writes a line and its end one by one: lines of several processes would mix.
            stream = os.fdopen(descriptor, "w", 1, encoding=stream.encoding, errors=stream.errors, closefd=False)
        setattr(sys, name, _Console(stream, descriptor, lost=closed))  # type: ignore[arg-type]


def _has_descriptor(stream: IO[str], descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError, AttributeError):
        return False


def fall_back_to(path: Path) -> None:
    """Where lines go that cannot be written. A stream that is gone already is moved there now."""
    global _fallback
    _fallback = path
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Console) and stream.lost:
            stream.move()
