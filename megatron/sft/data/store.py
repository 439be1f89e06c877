"""Writes tokenised data: conversations go to a scratch file as they come, then row by row, as packed, into the result.

Everything is written under temporary names next to the result and renamed at the end, the manifest last.
"""

import hashlib
import os
from array import array
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron.sft.chat.encoding import Conversation
from megatron.sft.data.packing import Packing, of_conversations, pack_groups, pack_rows, single_rows, single_rows_of_groups
from megatron.sft.data.tokenized import MODE_CONTINUES_GROUP, MODE_FIRST, MODE_TRAINED, SIDES, data_file, write_index
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import sealed, sha256_of_file, write_json
from megatron.sft.runtime.output_lock import held


class ConversationStore:
    """Tokens of conversations in a scratch file, and their lengths and runs in memory (about 16 bytes a turn).

    grouped: whether conversations that are added with the same `group` stay together.
    num_sources: how many sources they come from; with several, a .sources file has the source of each conversation.

    A context manager that removes the temporary files at its end, whatever happens. Those of a process that died are
    overwritten; a living one holds the output's lock, and a second writer is a `UserError`.
    """

    def __init__(self, prefix: Path, dtype: "np.dtype[Any]", grouped: bool = False, num_sources: int = 1) -> None:
        if num_sources > np.iinfo(np.int16).max:
            raise UserError(f"{num_sources} inputs are too many for one run: put them in one folder, or in fewer files")
        self.prefix = prefix
        self.has_sources = num_sources > 1
        self.sources = array("h")
        self.dtype = dtype
        self.grouped = grouped
        self.group_hashes = array("Q")  # of each conversation, if they are grouped
        self.lengths = array("q")
        self.runs = array("q")  # lengths, alternately not trained and trained, of all conversations in sequence
        self.num_runs = array("q")
        self.unit_size = 1  # conversations that are packed as one: 2 if they are pairs
        # By their place in the unit: of chosen and of rejected conversations, or the first of all.
        self.tokens_of_sides, self.trained_of_sides = [0, 0], [0, 0]
        self.max_token_id = -1
        self._scratch = self._temporary("tokens")

    def __enter__(self) -> "ConversationStore":
        self._lock = held(self.prefix)
        try:
            self._lock.__enter__()
            self._file: IO[bytes] = open(self._scratch, "w+b")
        except OSError as error:
            raise UserError(f"cannot write to {self.prefix.parent} ({error.strerror}): use --output-prefix") from None
        return self

    def __exit__(self, *error: object) -> None:
        for name in ("bin", "idx", "groups", "sources", "json", "tokens"):
            self._temporary(name).unlink(missing_ok=True)
        self._file.close()
        self._lock.__exit__(None, None, None)

    def add(self, *unit: Conversation) -> None:
        """Add a conversation, or the chosen and the rejected one of a pair. All units have one size."""
        assert len(unit) == self.unit_size or not self.lengths
        self.unit_size = len(unit)
        # A unit without a group gets its index, scrambled so that it equals another's hash as rarely as any two do.
        alone = len(self.lengths) // len(unit) * 0x9E3779B97F4A7C15 + 1
        for side, conversation in enumerate(unit):
            tokens = conversation.tokens
            assert conversation.mask_run_lengths[0] > 0
            assert sum(conversation.mask_run_lengths) == len(tokens)
            self._file.write(tokens.astype(self.dtype).tobytes())
            self.lengths.append(len(tokens))
            self.runs.extend(conversation.mask_run_lengths)
            self.num_runs.append(len(conversation.mask_run_lengths))
            self.tokens_of_sides[side] += len(tokens)
            self.trained_of_sides[side] += conversation.num_trained
            self.max_token_id = max(self.max_token_id, int(tokens.max()))
            self.sources.append(conversation.source)
            if self.grouped:
                self.group_hashes.append((alone if conversation.group is None else conversation.group) % (1 << 64))

    @property
    def num_units(self) -> int:
        return len(self.lengths) // self.unit_size

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens_of_sides)

    @property
    def num_trained(self) -> int:
        return sum(self.trained_of_sides)

    @property
    def groups(self) -> np.ndarray:
        """[conversations] int64: the group of each, numbered from 0."""
        _, groups = np.unique(np.frombuffer(self.group_hashes, dtype=np.uint64), return_inverse=True)
        return groups.astype(np.int64)

    def pack(self, seq_length: int, seed: int, packing: bool) -> Packing:
        """Rows of at most `seq_length` tokens, units and groups kept together; packing: False gives one unit a row."""
        lengths = self._unit_lengths()
        if self.grouped:
            groups = self.groups[:: self.unit_size]
            packed = pack_groups(lengths, groups, seq_length, seed) if packing else single_rows_of_groups(groups, seed)
        else:
            packed = pack_rows(lengths, seq_length, seed) if packing else single_rows(len(lengths), seed)
        return packed if self.unit_size == 1 else of_conversations(packed, self.unit_size)

    def _unit_lengths(self) -> np.ndarray:
        return np.asarray(np.frombuffer(self.lengths, dtype=np.int64).reshape(-1, self.unit_size).sum(1))

    def totals(self, packing: Packing, seq_length: int) -> dict[str, Any]:
        """What the manifest says of these conversations and rows as a whole: counts, fill, lengths. `row_units` counts the row
        groups by their number of rows."""
        lengths = np.frombuffer(self.lengths, dtype=np.int64)
        totals = {
            "length": seq_length,
            "rows": packing.num_rows,
            "conversations": len(lengths),
            "tokens": self.num_tokens,
            "trained_tokens": self.num_trained,
            "fill": self.num_tokens / (packing.num_rows * seq_length),
            "max_token_id": self.max_token_id,
            "conversation_lengths": length_statistics(lengths) | {"histogram": length_histogram(lengths)},
            "dtype": self.dtype.name,
        }
        if packing.continues_group.any():
            sizes, counts = np.unique(np.bincount(np.cumsum(~packing.continues_group) - 1), return_counts=True)
            totals["row_units"] = dict(zip(map(str, sizes.tolist()), counts.tolist(), strict=True))
        if self.unit_size > 1:
            sides = zip(SIDES, self.tokens_of_sides, self.trained_of_sides, strict=True)
            facts = {side: {"tokens": tokens, "trained_tokens": trained} for side, tokens, trained in sides}
            totals |= {"pairs": self.num_units, "sides": facts}
            totals["pair_lengths"] = length_statistics(self._unit_lengths())
        return totals | ({"groups": int(self.groups.max()) + 1} if self.grouped else {})

    def write(self, packing: Packing, manifest: dict[str, Any]) -> None:
        """Write the rows of `packing` and put the finished files in place. `manifest` gets `files` added."""
        num_bytes, digest = self._write_rows(packing)
        write_index(self._temporary("idx"), self.dtype, *self._segments(packing))
        files = {
            "bin": {"bytes": num_bytes, "sha256": digest},
            "idx": {"bytes": self._temporary("idx").stat().st_size, "sha256": sha256_of_file(self._temporary("idx"))},
        }
        for ending, values in self._values_per_conversation().items():
            path = self._temporary(ending)
            values[packing.conversations].tofile(path)
            files[ending] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        write_json(self._temporary("json"), sealed(manifest | {"files": files}))
        self._put_in_place()

    def _values_per_conversation(self) -> dict[str, np.ndarray]:
        """[conversations] arrays in the order of adding, by the ending of the file that holds them."""
        values = {"groups": self.groups} if self.grouped else {}
        return values | ({"sources": np.frombuffer(self.sources, dtype=np.int16)} if self.has_sources else {})

    def _put_in_place(self) -> None:
        """Rename the finished files, the manifest last: without it, .bin and .idx count as unfinished."""
        data_file(self.prefix, "json").unlink(missing_ok=True)
        for name in ("groups", "sources"):
            data_file(self.prefix, name).unlink(missing_ok=True)
        endings = ("bin", "idx", *self._values_per_conversation(), "json")
        try:
            for name in endings:
                os.replace(self._temporary(name), data_file(self.prefix, name))
        except BaseException:
            for name in endings[:-1]:
                data_file(self.prefix, name).unlink(missing_ok=True)
            raise

    def _write_rows(self, packing: Packing) -> tuple[int, str]:
        """Copy the conversations from the scratch file in packed order; returns the number of bytes and their SHA-256."""
        self._file.flush()
        scratch = np.memmap(self._scratch, dtype=self.dtype, mode="r")
        lengths = np.frombuffer(self.lengths, dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        digest, num_bytes = hashlib.sha256(), 0
        with open(self._temporary("bin"), "wb") as file:
            for row in range(packing.num_rows):
                members = packing.conversations[packing.starts[row] : packing.starts[row + 1]]
                pieces = [scratch[starts[index] : starts[index] + lengths[index]] for index in members]
                content = np.concatenate(pieces).tobytes()
                file.write(content)
                digest.update(content)
                num_bytes += len(content)
            file.flush()
            os.fsync(file.fileno())
        return num_bytes, digest.hexdigest()

    def _segments(self, packing: Packing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lengths of all segments in packed order, the first segment of every row and one past the last, and the modes."""
        runs = np.frombuffer(self.runs, dtype=np.int64)
        num_runs = np.frombuffer(self.num_runs, dtype=np.int64)
        counts = num_runs[packing.conversations]
        ends = np.concatenate([[0], np.cumsum(counts)])  # [conversations + 1], in packed order
        place = np.arange(ends[-1]) - np.repeat(ends[:-1], counts)  # of a run in its conversation
        first_runs = (np.cumsum(num_runs) - num_runs)[packing.conversations]
        lengths = runs[np.repeat(first_runs, counts) + place]
        modes = np.where(place % 2 == 1, MODE_TRAINED, 0) + np.where(place == 0, MODE_FIRST, 0)
        first_segments = ends[packing.starts]
        modes[first_segments[:-1][packing.continues_group]] |= MODE_CONTINUES_GROUP
        return lengths, first_segments, modes.astype(np.int8)

    def _temporary(self, name: str) -> Path:
        return self.prefix.with_name(f".{self.prefix.name}.{name}.tmp")


def length_statistics(lengths: np.ndarray) -> dict[str, Any]:
    """lengths: [n], at least one. The percentiles are lengths that occur."""
    shortest, median, p90, p99, longest = np.percentile(lengths, [0, 50, 90, 99, 100], method="lower").tolist()
    mean = float(lengths.mean())
    return {"mean": mean, "shortest": shortest, "median": median, "p90": p90, "p99": p99, "longest": longest}


def length_histogram(lengths: np.ndarray) -> list[list[int]]:
    """[[up_to, count], …]: how many lengths are at most `up_to` and above the previous `up_to`; four steps per doubling."""
    steps = np.unique(np.round(2 ** (np.arange(1, 4 * 40) / 4)).astype(np.int64))
    counts = np.bincount(np.searchsorted(steps, lengths))
    first = int(np.flatnonzero(counts)[0])
    return [[int(steps[index]), int(count)] for index, count in enumerate(counts.tolist()) if index >= first]
