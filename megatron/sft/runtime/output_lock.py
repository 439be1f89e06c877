"""One writer for each output: a lock that names its holder, on a local disk and on a file system that several machines share.

The kernel's lock (flock) decides between processes of one machine and is released when its holder dies. Where it does not
reach, between machines, the holder changes a number in the lock's file every few seconds, and whoever finds a file of another
machine watches that number, without trusting clocks.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.sft.runtime.errors import UserError

BEAT_SECONDS = 5.0
# A holder on another machine that has not changed its file for so long is dead.
SILENT_SECONDS = 30.0


@contextlib.contextmanager
def held(output: Path, lock: Path | None = None) -> Iterator[None]:
    """Hold `output` while open. If another process holds it: a `UserError` that names its host, process and start.

    lock: the lock's file, removed at the end; hidden next to the output unless given. One that a dead process left is taken.
    """
    lock = lock or output.with_name(f".{output.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(output, lock)
    stop = threading.Event()
    record = {"host": socket.gethostname(), "pid": os.getpid(), "space": _process_space(), "started": time.ctime()}

    def write(count: int) -> None:
        with contextlib.suppress(OSError):  # a full disk, a file system that is away: the lock is a courtesy then
            os.pwrite(descriptor, json.dumps({**record, "beat": count}).encode().ljust(512), 0)

    def beat() -> None:
        count = 1
        while not stop.wait(BEAT_SECONDS):
            count += 1
            write(count)

    write(1)
    thread = threading.Thread(target=beat, name="output lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(OSError):
            lock.unlink()  # before the lock is released, so that no one takes a file that is about to go
        os.close(descriptor)


def _acquire(output: Path, lock: Path) -> int:
    """A descriptor of the lock's file with the kernel's lock on it, where there is one."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            reaches = _flock(descriptor)
            found = _record(descriptor)
            here = (found.get("host"), found.get("space")) == (socket.gethostname(), _process_space())
            if reaches is False or (found and not here and _beats(lock, found)) or (here and not reaches and _lives(found)):
                raise UserError(_refusal(output, lock, found))
            # The holder before may have removed the file between our open and our lock.
            if os.path.exists(lock) and os.stat(lock).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int) -> bool | None:
    """True: locked. False: another process has it. None: this file system has no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _record(descriptor: int) -> dict[str, Any]:
    """What the holder wrote; empty for a new file, and for one that says nothing of use."""
    try:
        record = json.loads(os.pread(descriptor, 4096, 0).decode("utf-8", "replace") or "{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _beats(lock: Path, found: dict[str, Any]) -> bool:
    """Whether the file of another machine's process is still being changed. Takes up to SILENT_SECONDS."""
    print(f"{lock} is of process {found.get('pid')} on {found.get('host')}: looking whether it lives", flush=True)
    until = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < until:
        time.sleep(min(1.0, SILENT_SECONDS / 10))
        try:
            descriptor = os.open(lock, os.O_RDONLY)  # opened again: network file systems look then
        except FileNotFoundError:
            return False
        now = _record(descriptor)
        os.close(descriptor)
        if now != found:
            return True
    return False


def _lives(found: dict[str, Any]) -> bool:
    return Path(f"/proc/{found.get('pid')}").exists() and found.get("pid") != os.getpid()


def _process_space() -> str:
    """What tells a process's number in one container, or after a restart of the machine, from the same number in another."""
    try:
        return os.readlink("/proc/self/ns/pid") + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _refusal(output: Path, lock: Path, found: dict[str, Any]) -> str:
    holder = f"process {found.get('pid', 'unknown')} on {found.get('host', 'this machine')}"
    since = f", started {found['started']}" if found.get("started") else ""
    return f"{output} is being written by {holder}{since}: wait for it or end it, or give another output (the lock is {lock})"
