"""The thread of each process that writes its part of a checkpoint; on rank 0 it also assembles the checkpoint of all parts."""

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import _get_default_store

from megatron.sft.checkpoint.folder import (
    Kept,
    iteration_path,
    put_in_place,
    remove_old_checkpoints,
    unfinished_path,
    write_best,
)
from megatron.sft.checkpoint.shard_slice import ShardSlice
from megatron.sft.checkpoint.writing import CancelledError, WrittenPart, part_from_json, write_index, write_slices
from megatron.sft.runtime import stores
from megatron.sft.runtime.errors import cause_of

_PAUSE_SECONDS = 0.02


class StoreMailbox:
    """Texts by name, seen by all processes, about the save `save_number`. Each thread needs its own mailbox."""

    def __init__(self, save_number: int) -> None:
        self._store: Store = PrefixStore(f"checkpoint/{save_number}", _own_connection(_get_default_store()))

    def put(self, name: str, text: str) -> None:
        """Store a text; on return every process can read it."""
        self._store.set(name, text)
        # `set` does not wait. A second request returns only after the first was processed.
        self._store.check([name])

    def get(self, name: str) -> str | None:
        """The text, or None if it is not there yet."""
        if not self._store.check([name]):
            return None
        return bytes(self._store.get(name)).decode()


def _own_connection(store: Store) -> Store:
    """The store of the process group over another connection: a blocking call would block other users of the connection."""
    if torch.distributed.get_world_size() == 1:
        return store
    if hasattr(store, "clone"):
        return store.clone()
    prefixes = []
    while isinstance(store, PrefixStore):
        # This version of torch does not give the prefix itself; the store below it is the same for all processes.
        store = store.underlying_store
        prefixes.append("_")
    assert isinstance(store, TCPStore)
    return PrefixStore("/".join(["own", *prefixes]), stores.connect(store.host, store.port))


@dataclass(frozen=True)
class SaveResult:
    """How a save ended; the main threads act on it at their poll number `poll`."""

    error: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    poll: int = 0


class SaveTask:
    """One save in this process. `result` is set on rank 0 when the save has ended, well or with an error.

    timeout_seconds: how long rank 0 waits at least for the parts of the others. omitted: as `write_index` takes it.
    """

    def __init__(
        self,
        root: Path,
        iteration: int,
        slices: list[ShardSlice],
        manifest: dict[str, Any],
        kept: Kept,
        mailbox: StoreMailbox,
        timeout_seconds: float,
        omitted: Mapping[str, int],
    ) -> None:
        self.iteration = iteration
        self.result: dict[str, Any] | None = None
        self.stalled_seconds = 0.0
        self._root, self._manifest = root, manifest
        self._kept = kept
        self._slices = slices
        self._mailbox, self._timeout, self._omitted = mailbox, timeout_seconds, omitted
        self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._cancelled = threading.Event()
        self._reported = False
        self._started = 0.0
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)

    def start(self, started: float) -> None:
        """Start the thread; `started` is when the save began, in seconds of time.monotonic()."""
        self._started = started
        self._thread.start()

    def cancel(self) -> None:
        """Stop writing, if this process still does, and wait up to 10 s for it."""
        self._cancelled.set()
        self._thread.join(timeout=10)

    def report_death(self) -> None:
        """Report the thread's end to the other ranks if it died before it could. Called by the main thread."""
        if self._thread.is_alive():
            return
        if not self._reported:
            self._report({"error": "the thread that wrote it ended"})
        if self._rank == 0 and self.result is None:
            self._end("the thread that wrote it ended")

    def _run(self) -> None:
        try:
            folder = unfinished_path(self._root, self.iteration)
            written = write_slices(folder, self._rank, self._slices, self._cancelled)
            self._slices = []
            # Rank 0 assembles the parts and has its own.
            self._report({} if self._rank == 0 else asdict(written))
            if self._rank == 0:
                self._assemble(folder, written)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        reason = "it was canceled" if isinstance(error, CancelledError) else cause_of(error)
        if not self._reported:
            self._report({"error": reason})
        if self._rank == 0:
            self._end(reason)

    def _report(self, content: dict[str, Any]) -> None:
        self._mailbox.put(f"rank {self._rank}", json.dumps(content))
        self._reported = True

    def _end(self, error: str = "", notes: list[str] | None = None) -> None:
        seconds = time.monotonic() - self._started
        self.result = asdict(SaveResult(error, seconds, notes or []))

    def _assemble(self, folder: Path, own: WrittenPart) -> None:
        parts = [own, *(self._part(rank) for rank in range(1, self._world))]
        files = write_index(folder, parts, self._omitted)
        put_in_place(self._root, self.iteration, folder, {**self._manifest, "files": files})
        notes = []
        try:
            if best := self._best():
                write_best(self._root, *best)
            removed = remove_old_checkpoints(self._root, self.iteration, self._kept)
            if removed:
                notes = [f"removed {', '.join(iteration_path(self._root, i).name for i in removed)} (KEEP_LAST)"]
        except OSError as error:
            notes = [f"warning: an old checkpoint could not be removed, or the best one not be named: {cause_of(error)}"]
        self._end(notes=notes)

    def _best(self) -> tuple[int, float] | None:
        """The best checkpoint and its validation loss, by the manifest."""
        watch = self._manifest["training"].get("watch", {})
        return (watch["best"], watch["best_loss"]) if watch.get("best") is not None else None

    def _part(self, rank: int) -> WrittenPart:
        """What rank `rank` has written; waits for it."""
        # Its part is as large as this one's, and its disk may be busier.
        deadline = time.monotonic() + max(self._timeout, 3 * (time.monotonic() - self._started))
        while (text := self._mailbox.get(f"rank {rank}")) is None:
            if self._cancelled.is_set():
                raise CancelledError
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {rank} did not report its part as written within {self._timeout / 60:.0f} minutes")
            time.sleep(_PAUSE_SECONDS)
        content = json.loads(text)
        if "error" in content:
            raise RuntimeError(f"rank {rank}: {content['error']}")
        return part_from_json(content)
