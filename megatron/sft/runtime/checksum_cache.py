"""Checksums of large files that are computed once: a small file remembers which file, of which size and times, had which.

Who can change that memory can change the files as well, and gains no more than if they were not hashed at all: whatever else
is checked of them is checked every time. To have everything read again, remove it.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.sft.runtime import watchdog
from megatron.sft.runtime.manifest import Files, check_sums, write_json

# What takes longer is told of: a disk or a network file system reads some hundred megabytes a second.
TOLD_BYTES = 1 << 30
_TOLD_SECONDS = 15.0
# A file that changed so shortly before may change again within the same tick of the file system's clock.
_SETTLED_NS = 2_000_000_000


def check_once(files: Files, advice: str, memories: tuple[Path, ...]) -> None:
    """Compare checksums but for files that a memory knows; then remember in the first place that can be written to."""
    known = {name: facts for memory in memories for name, facts in _remembered(memory).items()}
    due = {path: facts for path, facts in files.items() if known.get(_name(path)) != _identity(path, facts)}
    if not due:
        return
    started_ns = time.time_ns()
    before = {path: _identity(path, facts) for path, facts in due.items()}
    check_sums(due, advice, _Progress(due).add)
    settled = {
        _name(path): identity
        for path, identity in before.items()
        if identity == _identity(path, due[path]) and identity["changed_ns"] < started_ns - _SETTLED_NS
    }
    for memory in memories:
        with contextlib.suppress(OSError):
            if settled and memory.parent.is_dir():
                write_json(memory, {"files": {**_remembered(memory), **settled}})
                return


def _name(path: Path) -> str:
    return str(path.resolve())


def _identity(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The checksum that a file should have, and by what a change to it would show."""
    status = path.stat()
    changed = max(status.st_mtime_ns, status.st_ctime_ns)
    return {"sha256": facts["sha256"], "bytes": status.st_size, "changed_ns": changed, "inode": status.st_ino}


def _remembered(memory: Path) -> dict[str, Any]:
    """What a memory says; nothing if it is missing or damaged."""
    try:
        files = json.loads(memory.read_text(encoding="utf-8"))["files"]
        return dict(files)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


class _Progress:
    """Says what is read, if that is much, and now and then how far it is."""

    def __init__(self, files: Files) -> None:
        self.total = sum(facts["bytes"] for facts in files.values())
        self.done, self.started, self.told = 0, time.monotonic(), time.monotonic()
        self._lock = threading.Lock()
        if self.total >= TOLD_BYTES:
            folder = next(iter(files)).parent
            _say(f"checking {len(files)} files in {folder} against their manifest, {self.total / 1e9:.1f} GB")

    def add(self, num_bytes: int) -> None:
        watchdog.touch()
        with self._lock:
            self.done += num_bytes
            now, seconds = time.monotonic(), time.monotonic() - self.started
            finished = self.done >= self.total
            if self.total < TOLD_BYTES or (now - self.told < _TOLD_SECONDS and not finished):
                return
            self.told = now
        _say(f"checked {self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB in {seconds:.0f} s")


def _say(message: str) -> None:
    node = os.environ.get("GROUP_RANK", "0")
    print(message if node == "0" else f"node {node}: {message}", flush=True)
