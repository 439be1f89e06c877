"""Fifty ways to lose a terminal, a pipe, a lock's holder or disk space: nothing is lost, nothing is silent, nothing ends.

A small process talks in place of a run, with the code that every command has; `test_console.py` does the same with real runs.
"""

import contextlib
import json
import os
import pty
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.sft.reporting.metrics import MetricsLog
from megatron.sft.runtime import manifest, output_lock
from megatron.sft.runtime.errors import UserError
from tests.support import tiny
from tests.support.step_figures import RECORD, SHAPE

SECONDS = 60
LINES = 40
# Prints lines to both streams and says at the end, by a file, that it came so far.
TALKER = """
import sys, time
from pathlib import Path
from megatron.sft.runtime import console, errors
fallback, finished, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
def main():
    console.fall_back_to(fallback)
    for number in range(40):
        print(f"out {number} \\u00e9\\u4e2d", flush=True)
        print(f"err {number}", file=sys.stderr, flush=True)
        time.sleep(pause)
    finished.write_text("yes")
    return 0
errors.run(main)
"""
# A line of bash in which {talk} is the talker and {reader} a file for what a reader still got; then the streams whose lines
# must all be found, in the reader's file, on the console or in the fallback.
SHELL: dict[str, tuple[str, str]] = {
    "a full disk under the output": ("{talk} >/dev/full", "out err"),
    "a full disk under the errors": ("{talk} 2>/dev/full", "out err"),
    "a full disk under both": ("{talk} >/dev/full 2>&1", "out err"),
    "the output is closed": ("{talk} >&-", "out err"),
    "the errors are closed": ("{talk} 2>&-", "out err"),
    "both are closed": ("{talk} >&- 2>&-", "out err"),
    "all three are closed": ("{talk} <&- >&- 2>&-", "out err"),
    "the input is closed": ("{talk} <&-", "out err"),
    "head takes a line": ("{talk} | head -n 1 >{reader}", "err"),
    "head takes a line of both": ("{talk} 2>&1 | head -n 1 >{reader}", ""),
    "head takes a byte": ("{talk} | head -c 1 >{reader}", "err"),
    "a reader that never reads": ("{talk} | true", "err"),
    "a reader that sleeps and goes": ("{talk} | sleep 0.2", "err"),
    "a reader that closed its input": ("{talk} | (exec <&-; sleep 0.5)", "err"),
    "a reader that fails": ("{talk} | false", "err"),
    "a reader of the errors that is gone": ("{talk} 2> >(true)", "out"),
    "a process for the output that is gone": ("{talk} > >(true)", "err"),
    "tee onto a full disk": ("{talk} 2>&1 | tee /dev/full >{reader}", "out err"),
    "tee whose own output is gone": ("{talk} 2>&1 | tee {reader} | true", ""),
    "grep -m1": ("{talk} | grep -m 1 out >{reader}", "err"),
    "a descriptor that can only be read": ("{talk} 1</dev/null", "out err"),
    "both can only be read": ("{talk} 1</dev/null 2</dev/null", "out err"),
    "a limit of the file's size": ("ulimit -f 0; {talk} >{reader} 2>{reader}.2", ""),
    "a terminal's encoding without letters": ("PYTHONIOENCODING=ascii LC_ALL=C {talk} >{reader}", "err"),
    "Python without buffers": ("PYTHONUNBUFFERED=1 {talk} >/dev/full", "out err"),
    "Python with a debug mode": ("PYTHONDEVMODE=1 {talk} >&-", "out err"),
    "hangups are ignored": ("trap '' HUP; {talk} | true", "err"),
    "broken pipes are ignored": ("trap '' PIPE; {talk} | true", "err"),
    "broken pipes kill": ("trap - PIPE; {talk} | true", "err"),
    "in the background, its shell gone": ("({talk} | true) & wait", "err"),
}


def talker(folder: Path, fallback: Path | None = None, pause: float = 0.002) -> list[str]:
    return [sys.executable, "-c", TALKER, str(fallback or folder / "run" / "console.log"), str(folder / "finished"), str(pause)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tiny.ROOT)}


def test_lines_of_several_processes_stay_whole(tmp_path: Path) -> None:
    quick = " & ".join("'" + "' '".join(talker(tmp_path / str(number), pause=0)) + "'" for number in range(8))
    (tmp_path / "talk").write_text(f"#!/bin/bash\n{quick} & wait")
    for number in range(8):
        (tmp_path / str(number)).mkdir()
    with_each = environment() | {"PYTHONUNBUFFERED": "1"}
    done = subprocess.run(["bash", tmp_path / "talk"], env=with_each, capture_output=True, text=True, timeout=SECONDS)
    for stream, output in (("out", done.stdout), ("err", done.stderr)):
        expected = [f"{stream} {line}" + (" é中" if stream == "out" else "") for line in range(LINES) for _ in range(8)]
        assert sorted(output.splitlines()) == sorted(expected)


@pytest.mark.parametrize("way", SHELL)
def test_a_process_whose_console_goes_away_ends_as_if_nothing_were(way: str, tmp_path: Path) -> None:
    line, whole = SHELL[way]
    (tmp_path / "talk").write_text("#!/bin/bash\nexec " + " ".join(f"'{word}'" for word in talker(tmp_path)))
    (tmp_path / "talk").chmod(0o755)
    reader = tmp_path / "reader"
    command = "set -o pipefail; " + line.format(talk=tmp_path / "talk", reader=reader)
    done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True, timeout=SECONDS)
    until = time.monotonic() + SECONDS
    while not (tmp_path / "finished").exists() and time.monotonic() < until:
        time.sleep(0.05)
    if "ulimit" not in line:  # which also forbids this file
        assert (tmp_path / "finished").read_text() == "yes", done.stderr
    files = [path for path in (tmp_path / "run" / "console.log", reader) if path.is_file()]
    found = done.stdout + done.stderr + "".join(path.read_text(errors="replace") for path in files)
    for stream in whole.split():
        missing = [number for number in range(LINES) if f"{stream} {number}" not in found]
        assert not missing, f"{stream}: lines {missing} are lost"
    if "Traceback" in found or "Exception ignored" in found:
        raise AssertionError(found)


def on_a_socket(folder: Path) -> None:
    mine, theirs = socket.socketpair()
    process = subprocess.Popen(talker(folder), env=environment(), stdout=theirs, stderr=subprocess.DEVNULL)
    theirs.close()
    mine.recv(10)
    mine.close()
    assert process.wait(SECONDS) == 0


def on_a_pipe_that_does_not_wait(folder: Path) -> None:
    """Node.js leaves pipes so: a full one says EAGAIN, and Python loses what was to be written."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 65536)
    process = subprocess.Popen(talker(folder), env=environment(), stdout=writer, stderr=subprocess.DEVNULL)
    os.close(writer)
    time.sleep(0.5)
    said = b""
    while piece := os.read(reader, 65536):
        said += piece
    os.close(reader)
    assert process.wait(SECONDS) == 0 and said.count(b"out ") == LINES


def on_a_terminal_that_is_closed(folder: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(talker(folder), env=environment(), stdout=slave, stderr=slave)
    os.close(slave)
    os.read(master, 10)
    os.close(master)
    assert process.wait(SECONDS) == 0
    assert f"out {LINES - 1}" in (folder / "run" / "console.log").read_text()


def on_a_fifo_whose_reader_is_killed(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    reader = subprocess.Popen(["cat", str(folder / "fifo")], stdout=subprocess.DEVNULL)
    with open(folder / "fifo", "wb") as fifo:
        process = subprocess.Popen(talker(folder, pause=0.02), env=environment(), stdout=fifo, stderr=subprocess.DEVNULL)
    time.sleep(0.3)
    reader.kill()
    assert process.wait(SECONDS) == 0


def with_the_fallback_in_a_file(folder: Path) -> None:
    (folder / "file").write_text("")
    assert quiet(folder, folder / "file" / "console.log") == 0


def with_the_fallback_on_a_full_disk(folder: Path) -> None:
    assert quiet(folder, Path("/dev/full")) == 0


def with_a_folder_as_the_fallback(folder: Path) -> None:
    (folder / "console.log").mkdir()
    assert quiet(folder, folder / "console.log") == 0


def quiet(folder: Path, fallback: Path) -> int:
    with open("/dev/full", "w") as full:
        return subprocess.call(talker(folder, fallback), env=environment(), stdout=full, stderr=full, timeout=SECONDS)


def with_a_log_that_is_deleted(folder: Path) -> None:
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(talker(folder, pause=0.01), env=environment(), stdout=log, stderr=log)
    (folder / "log").unlink()
    assert process.wait(SECONDS) == 0


def metrics_without_their_disk(folder: Path) -> None:
    """Lines that could not be written are written when the disk is back."""
    log = MetricsLog(folder / "gone", 100, 80, 0, SHAPE)
    log.step(RECORD)
    (folder / "gone").mkdir()
    log.step(RECORD)
    assert len((folder / "gone" / "metrics.jsonl").read_text().splitlines()) == 2


def a_small_file_on_a_full_disk(folder: Path) -> None:
    """The old content stays whole, and nothing is left next to it."""
    manifest.write_text(folder / "tracker", "10")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            manifest.write_text(folder / "tracker", "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (folder / "tracker").read_text() == "10" and len(list(folder.iterdir())) == 1


def a_lock(folder: Path, content: bytes) -> Path:
    lock = folder / ".run.lock"
    lock.write_bytes(content)
    return lock


def is_taken(folder: Path, content: bytes) -> None:
    lock = a_lock(folder, content)
    with output_lock.held(folder / "run"):
        assert json.loads(lock.read_bytes())["pid"] == os.getpid()
    assert not lock.exists()


def an_empty_lock(folder: Path) -> None:
    is_taken(folder, b"")


def a_lock_that_was_cut_off(folder: Path) -> None:
    is_taken(folder, b'{"host": "n1", "pi')


def a_lock_of_noise(folder: Path) -> None:
    is_taken(folder, os.urandom(512))


def a_lock_of_another_kind_of_json(folder: Path) -> None:
    is_taken(folder, b"[1, 2]")


def a_lock_of_a_process_that_is_gone(folder: Path) -> None:
    gone = {"host": socket.gethostname(), "pid": 2**22 + 1, "space": output_lock._process_space()}
    is_taken(folder, json.dumps(gone).encode())


def a_lock_of_this_process_from_before_a_restart(folder: Path) -> None:
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "space": output_lock._process_space()}
    is_taken(folder, json.dumps(mine).encode())


HOLDER = """
import sys, time
from pathlib import Path
from megatron.sft.runtime.output_lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder / "run")], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def a_holder_that_is_killed(folder: Path) -> None:
    process = holder(folder)
    with pytest.raises(UserError, match=f"process {process.pid}"), output_lock.held(folder / "run"):
        pass
    process.kill()
    process.wait()
    with output_lock.held(folder / "run"):
        pass


def a_holder_that_is_stopped(folder: Path) -> None:
    """Ctrl-Z: it still holds."""
    process = holder(folder)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="is being written"), output_lock.held(folder / "run"):
        pass
    process.kill()
    process.wait()


def many_at_once(folder: Path) -> None:
    """One of them holds at any time."""
    inside, most = [0], [0]
    guard = threading.Lock()

    def contend() -> None:
        for _ in range(20):
            with contextlib.suppress(UserError), output_lock.held(folder / "run"):
                with guard:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                with guard:
                    inside[0] -= 1

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1


WAYS: list[Callable[[Path], None]] = [
    on_a_socket, on_a_pipe_that_does_not_wait, on_a_terminal_that_is_closed, on_a_fifo_whose_reader_is_killed,
    with_the_fallback_in_a_file, with_the_fallback_on_a_full_disk, with_a_folder_as_the_fallback, with_a_log_that_is_deleted,
    metrics_without_their_disk, a_small_file_on_a_full_disk, an_empty_lock, a_lock_that_was_cut_off, a_lock_of_noise,
    a_lock_of_another_kind_of_json, a_lock_of_a_process_that_is_gone, a_lock_of_this_process_from_before_a_restart,
    a_holder_that_is_killed, a_holder_that_is_stopped, many_at_once,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.replace("_", " "))
def test_nothing_is_lost_and_nothing_ends(way: Callable[[Path], None], tmp_path: Path) -> None:
    way(tmp_path)


def test_there_are_about_fifty() -> None:
    assert len(SHELL) + len(WAYS) + 4 >= 50  # test_console.py has four more, with real runs
