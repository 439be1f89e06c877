"""Checksums of large files that are computed once: a small JSON file, the cache, keeps each file's checksum, size and times.

Anyone who can write the cache can write the files too, and gains nothing by it: every other check of the files runs every time.
To have all files read again, remove the cache.
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

# Report reads longer than this: disks and network file systems read a few hundred MB/s.
REPORTED_BYTES = 1 << 30
_REPORT_SECONDS = 15.0
# A file that changed within this time may change again within the same tick of the file system's clock.
MTIME_GRANULARITY_NS = 2_000_000_000


def check_once(files: Files, advice: str, caches: tuple[Path, ...]) -> None:
    """Compare the SHA-256 of files with their manifest's, except of those in a cache that have not changed since.

    What was read is added to the first cache that can be written. `UserError`, ending in `advice`, for a file that is damaged
    or cannot be read.
    """
    known = {name: stamp for cache in caches for name, stamp in load_cache(cache).items()}
    due = {path: facts for path, facts in files.items() if known.get(cache_key(path)) != file_stamp(path, facts)}
    if not due:
        return
    started_ns = time.time_ns()
    before = {path: file_stamp(path, facts) for path, facts in due.items()}
    check_sums(due, advice, _Progress(due).add)
    settled = {
        cache_key(path): stamp
        for path, stamp in before.items()
        if stamp == file_stamp(path, due[path]) and stamp["changed_ns"] < started_ns - MTIME_GRANULARITY_NS
    }
    for cache in caches:
        with contextlib.suppress(OSError):
            if settled and cache.parent.is_dir():
                write_json(cache, {"files": {**load_cache(cache), **settled}})
                return


def cache_key(path: Path) -> str:
    """A file's name in a cache: its absolute path, links resolved."""
    return str(path.resolve())


def file_stamp(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The checksum that the manifest's `facts` give a file, and what a change to the file would alter: size, times, inode."""
    status = path.stat()
    # ctime too: a program can set mtime back, but not ctime.
    changed = max(status.st_mtime_ns, status.st_ctime_ns)
    return {"sha256": facts["sha256"], "bytes": status.st_size, "changed_ns": changed, "inode": status.st_ino}


def load_cache(cache: Path) -> dict[str, Any]:
    """Stamps by `cache_key`; empty if the cache is missing or damaged."""
    try:
        return dict(json.loads(cache.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


class _Progress:
    """Logs progress when hashing large files."""

    def __init__(self, files: Files) -> None:
        self.total = sum(facts["bytes"] for facts in files.values())
        self.done, self.started, self.reported = 0, time.monotonic(), time.monotonic()
        self._lock = threading.Lock()  # files are hashed in several threads
        if self.total >= REPORTED_BYTES:
            folder = next(iter(files)).parent
            _print(f"checking {len(files)} files in {folder} against their manifest, {self.total / 1e9:.1f} GB")

    def add(self, num_bytes: int) -> None:
        watchdog.touch()
        with self._lock:
            self.done += num_bytes
            now = time.monotonic()
            due = self.done >= self.total or now - self.reported >= _REPORT_SECONDS
            if self.total < REPORTED_BYTES or not due:
                return
            self.reported = now
        _print(f"checked {self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB in {now - self.started:.0f} s")


def _print(message: str) -> None:
    node = os.environ.get("GROUP_RANK", "0")
    print(message if node == "0" else f"node {node}: {message}", flush=True)
