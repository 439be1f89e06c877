"""The thread of a process that writes its part of a checkpoint; the first process's makes the whole of all parts."""

import json
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import _get_default_store

from megatron.sft.checkpoint.assembling import write_index
from megatron.sft.checkpoint.folder import iteration_path, put_in_place, remove_old_checkpoints, unfinished_path
from megatron.sft.checkpoint.pieces import Piece
from megatron.sft.checkpoint.writing import CancelledError, Written, stored_piece, write_pieces
from megatron.sft.runtime.errors import cause_of

_PAUSE_SECONDS = 0.02


class Exchange:
    """Notes by name, seen by all processes, of the save with this `number`. Each thread needs one of its own."""

    def __init__(self, number: int) -> None:
        self._store: Store = PrefixStore(f"checkpoint/{number}", _own_connection(_get_default_store()))

    def put(self, name: str, text: str) -> None:
        """Leave a note; on return every process can see it."""
        self._store.set(name, text)
        # The answer to a second question says that the first was heard.
        self._store.check([name])

    def get(self, name: str) -> str | None:
        """The note, or None if it is not there yet."""
        if not self._store.check([name]):
            return None
        return bytes(self._store.get(name)).decode()


def _own_connection(store: Store) -> Store:
    """The store that the processes met in, over another connection: one that waits holds up whoever shares it."""
    if torch.distributed.get_world_size() == 1:
        return store
    if hasattr(store, "clone"):
        return store.clone()
    prefixes = []
    while isinstance(store, PrefixStore):
        # The name is not to be had in this version of torch; what is below it is the same for all processes.
        store = store.underlying_store
        prefixes.append("_")
    assert isinstance(store, TCPStore)
    return PrefixStore("/".join(["own", *prefixes]), TCPStore(store.host, store.port, is_master=False))


@dataclass(frozen=True)
class Outcome:
    """How a save ended; the main threads take note at their poll number `poll`."""

    error: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    poll: int = 0


class Job:
    """One save in this process. `outcome` is set on the first process when the save has ended, in whatever way."""

    def __init__(
        self,
        root: Path,
        iteration: int,
        pieces: list[Piece],
        manifest: dict[str, Any],
        keep_last: int,
        keep_every: int,
        exchange: Exchange,
        timeout_seconds: float,
    ) -> None:
        self.iteration = iteration
        self.outcome: dict[str, Any] | None = None
        self.stood_still = 0.0
        self._root, self._manifest = root, manifest
        self._keep_last, self._keep_every = keep_last, keep_every
        self._pieces = pieces
        self._exchange, self._timeout = exchange, timeout_seconds
        self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._cancelled = threading.Event()
        self._reported = False
        self._started = 0.0
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)

    def start(self, started: float) -> None:
        """Begin; `started` is when the save began, of time.monotonic()."""
        self._started = started
        self._thread.start()

    def cancel(self) -> None:
        """Stop writing if this process still does, and wait for that."""
        self._cancelled.set()
        self._thread.join(timeout=10)

    def report_death(self) -> None:
        """Tell the others if the thread has ended without a word. Called by the main thread."""
        if self._thread.is_alive():
            return
        if not self._reported:
            self._report({"error": "the thread that wrote it ended"})
        if self._rank == 0 and self.outcome is None:
            self._end("the thread that wrote it ended")

    def _run(self) -> None:
        try:
            folder = unfinished_path(self._root, self.iteration)
            written = write_pieces(folder, self._rank, self._pieces, self._cancelled)
            self._pieces = []
            # What the first process reports stays with it.
            self._report({} if self._rank == 0 else asdict(written))
            if self._rank == 0:
                self._assemble(folder, written)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        reason = "it was given up" if isinstance(error, CancelledError) else cause_of(error)
        if not self._reported:
            self._report({"error": reason})
        if self._rank == 0:
            self._end(reason)

    def _report(self, content: dict[str, Any]) -> None:
        self._exchange.put(f"rank {self._rank}", json.dumps(content))
        self._reported = True

    def _end(self, error: str = "", notes: list[str] | None = None) -> None:
        seconds = time.monotonic() - self._started
        self.outcome = asdict(Outcome(error, seconds, notes or []))

    def _assemble(self, folder: Path, own: Written) -> None:
        parts = [own, *(self._part(rank) for rank in range(1, self._world))]
        files = write_index(folder, parts)
        put_in_place(self._root, self.iteration, folder, {**self._manifest, "files": files})
        notes = []
        try:
            gone = remove_old_checkpoints(self._root, self.iteration, self._keep_last, self._keep_every)
            if gone:
                notes = [f"removed {', '.join(iteration_path(self._root, i).name for i in gone)} (KEEP_LAST)"]
        except OSError as error:
            notes = [f"warning: an old checkpoint could not be removed: {cause_of(error)}"]
        self._end(notes=notes)

    def _part(self, rank: int) -> Written:
        """What another process has written; waits for it."""
        # Its part is as large as this one's, and its disk may be busier.
        deadline = time.monotonic() + max(self._timeout, 3 * (time.monotonic() - self._started))
        while (text := self._exchange.get(f"rank {rank}")) is None:
            if self._cancelled.is_set():
                raise CancelledError
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"rank {rank} did not say within {self._timeout / 60:.0f} minutes that its part is written"
                )
            time.sleep(_PAUSE_SECONDS)
        content = json.loads(text)
        if "error" in content:
            raise RuntimeError(f"rank {rank}: {content['error']}")
        return Written(content["files"], [stored_piece(piece) for piece in content["pieces"]])
