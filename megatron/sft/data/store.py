"""Writes tokenised data: conversations go to a scratch file as they come, then row by row, as packed, into the result.

Everything is written under temporary names beside the result and renamed at the end, the manifest last.
"""

import fcntl
import hashlib
import os
from array import array
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from megatron.sft.chat.encoding import Conversation
from megatron.sft.data.packing import Packing, pack_groups, pack_rows, single_rows, single_rows_of_groups
from megatron.sft.data.tokenized import MODE_FIRST, MODE_JOINED, MODE_TRAINED, file_of, write_index
from megatron.sft.data.totals import totals_of
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import sealed, sha256_of_file, write_json


class ConversationStore:
    """Tokens of conversations in a scratch file, and their lengths and runs in memory (about 16 bytes a turn).

    grouped: whether conversations that were added with the same `group` are to stay together.
    num_sources: of how many sources they are; several are told apart in a file of their own.

    A context manager: whatever happens, the temporary files are gone at its end. Those of a process that died are
    written over; those of a process that lives are locked, and a second writer is refused.
    """

    def __init__(self, prefix: Path, dtype: "np.dtype[Any]", grouped: bool = False, num_sources: int = 1) -> None:
        if num_sources > np.iinfo(np.int16).max:
            raise UserError(
                f"{num_sources} inputs are too many to be told apart: put them in one folder, or in fewer files"
            )
        self.prefix = prefix
        self.has_sources = num_sources > 1
        self.sources = array("h")
        self.dtype = dtype
        self.grouped = grouped
        self.group_hashes = array("Q")  # of each conversation, where they are grouped
        self.lengths = array("q")
        self.runs = array("q")  # alternately not trained and trained, for all conversations one after another
        self.num_runs = array("q")
        self.num_tokens = 0
        self.num_trained = 0
        self.max_token_id = -1
        self._scratch = self._temporary("tokens")

    def __enter__(self) -> "ConversationStore":
        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            # Not truncated before it is locked: another process may be writing it.
            self._file: IO[bytes] = open(os.open(self._scratch, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        except OSError as error:
            raise UserError(f"cannot write to {self.prefix.parent} ({error.strerror}): use --output-prefix") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"another process is writing {self.prefix}.*: wait for it to finish") from None
        except OSError:
            pass  # a file system without locks
        self._file.truncate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in ("bin", "idx", "groups", "sources", "json", "tokens"):
            self._temporary(name).unlink(missing_ok=True)
        self._file.close()

    def add(self, conversation: Conversation) -> None:
        tokens = conversation.tokens
        assert conversation.mask_run_lengths[0] > 0
        assert sum(conversation.mask_run_lengths) == len(tokens)
        self._file.write(tokens.astype(self.dtype).tobytes())
        self.lengths.append(len(tokens))
        self.runs.extend(conversation.mask_run_lengths)
        self.num_runs.append(len(conversation.mask_run_lengths))
        self.num_tokens += len(tokens)
        self.num_trained += conversation.num_trained
        self.max_token_id = max(self.max_token_id, int(tokens.max()))
        self.sources.append(conversation.source)
        if self.grouped:
            # Its own number, scrambled, is as unlike all other hashes as these are unlike one another.
            alone = len(self.group_hashes) * 0x9E3779B97F4A7C15 + 1
            self.group_hashes.append((alone if conversation.group is None else conversation.group) % (1 << 64))

    @property
    def groups(self) -> np.ndarray:
        """[conversations] int64: the group of each, numbered from 0 on."""
        _, numbers = np.unique(np.frombuffer(self.group_hashes, dtype=np.uint64), return_inverse=True)
        return numbers.astype(np.int64)

    def pack(self, row_length: int, seed: int, packing: bool) -> Packing:
        """Rows of at most `row_length` tokens, groups kept together; packing: False gives one conversation a row."""
        lengths = np.frombuffer(self.lengths, dtype=np.int64)
        if self.grouped:
            groups = self.groups
            return pack_groups(lengths, groups, row_length, seed) if packing else single_rows_of_groups(groups, seed)
        return pack_rows(lengths, row_length, seed) if packing else single_rows(len(lengths), seed)

    def totals(self, packing: Packing, row_length: int) -> dict[str, Any]:
        """What the manifest says of these conversations and rows as a whole."""
        lengths = np.frombuffer(self.lengths, dtype=np.int64)
        totals = totals_of(lengths, self.num_trained, self.max_token_id, packing, row_length)
        return totals | {"dtype": self.dtype.name} | ({"groups": int(self.groups.max()) + 1} if self.grouped else {})

    def write(self, packing: Packing, manifest: dict[str, Any]) -> None:
        """Write the rows of `packing` and put the finished files in place. `manifest` gets `files` added."""
        num_bytes, digest = self._write_rows(packing)
        write_index(self._temporary("idx"), self.dtype, *self._segments(packing))
        files = {
            "bin": {"bytes": num_bytes, "sha256": digest},
            "idx": {"bytes": self._temporary("idx").stat().st_size, "sha256": sha256_of_file(self._temporary("idx"))},
        }
        for name, numbers in self._numbers().items():
            path = self._temporary(name)
            numbers[packing.conversations].tofile(path)
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        write_json(self._temporary("json"), sealed(manifest | {"files": files}))
        self._put_in_place()

    def _numbers(self) -> dict[str, np.ndarray]:
        """What is kept of each conversation in a file of its own, by the file's ending."""
        numbers = {"groups": self.groups} if self.grouped else {}
        return numbers | ({"sources": np.frombuffer(self.sources, dtype=np.int16)} if self.has_sources else {})

    def _put_in_place(self) -> None:
        """Rename the finished files, the manifest last: without it, .bin and .idx count as unfinished."""
        file_of(self.prefix, "json").unlink(missing_ok=True)
        for name in ("groups", "sources"):
            file_of(self.prefix, name).unlink(missing_ok=True)
        endings = ("bin", "idx", *self._numbers(), "json")
        try:
            for name in endings:
                os.replace(self._temporary(name), file_of(self.prefix, name))
        except BaseException:
            for name in endings[:-1]:
                file_of(self.prefix, name).unlink(missing_ok=True)
            raise

    def _write_rows(self, packing: Packing) -> tuple[int, str]:
        """Copy the conversations from the scratch file in packed order. Gives the number of bytes and their SHA-256."""
        self._file.flush()
        scratch = np.memmap(self._scratch, dtype=self.dtype, mode="r")
        lengths = np.frombuffer(self.lengths, dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        digest, num_bytes = hashlib.sha256(), 0
        with open(self._temporary("bin"), "wb") as file:
            for row in range(packing.num_rows):
                members = packing.conversations[packing.starts[row] : packing.starts[row + 1]]
                pieces = [scratch[starts[one] : starts[one] + lengths[one]] for one in members]
                content = np.concatenate(pieces).tobytes()
                file.write(content)
                digest.update(content)
                num_bytes += len(content)
            file.flush()
            os.fsync(file.fileno())
        return num_bytes, digest.hexdigest()

    def _segments(self, packing: Packing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lengths of all segments in packed order, the first segment of every row and one past the last, and modes."""
        runs = np.frombuffer(self.runs, dtype=np.int64)
        num_runs = np.frombuffer(self.num_runs, dtype=np.int64)
        counts = num_runs[packing.conversations]
        ends = np.concatenate([[0], np.cumsum(counts)])  # [conversations + 1], in packed order
        place = np.arange(ends[-1]) - np.repeat(ends[:-1], counts)  # of a run in its conversation
        first_runs = (np.cumsum(num_runs) - num_runs)[packing.conversations]
        lengths = runs[np.repeat(first_runs, counts) + place]
        modes = np.where(place % 2 == 1, MODE_TRAINED, 0) + np.where(place == 0, MODE_FIRST, 0)
        first_segments = ends[packing.starts]
        modes[first_segments[:-1][packing.joined]] |= MODE_JOINED
        return lengths, first_segments, modes.astype(np.int8)

    def _temporary(self, name: str) -> Path:
        return self.prefix.with_name(f".{self.prefix.name}.{name}.tmp")
