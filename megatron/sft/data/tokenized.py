"""Reads tokenised data: the .bin and .idx files of Megatron's IndexedDataset, and their .json manifest.

A document of the two files is a packed row, a sequence is a segment (a run of tokens with one role in training), and the mode
byte of a sequence has the bits MODE_TRAINED, MODE_FIRST and MODE_CONTINUES_GROUP. Needs only numpy, so that training can import
it. With grouped conversations, a .groups file has the group of each, int64, in the order of the .bin file; with several
sources, a .sources file has the index of each conversation's source in the manifest's list, int16. In preference data (the
manifest has `pairs`) the conversations of every row are pairs: the chosen one, then the rejected one.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import Files, check_sizes, read_json, seal_holds

FORMAT = 1
REBUILD = "run scripts/3_tokenize.sh again"
MODE_TRAINED = 1  # the loss is taken on predicting the tokens of this segment
MODE_FIRST = 2  # the first segment of a conversation
MODE_CONTINUES_GROUP = 4  # the first segment of a row that training keeps together with the row before it
SIDES = ("chosen", "rejected")  # of a preference pair, in the order of the files
# What a manifest must have, as whole numbers.
COUNTS = ("rows", "tokens", "length", "conversations", "trained_tokens", "max_token_id")
# Endings of the files that a manifest names, and their bytes per conversation where those are fixed.
BYTES_PER_CONVERSATION = {"bin": None, "idx": None, "groups": 8, "sources": 2}

# The .idx file: this header, then int32 lengths and int64 byte offsets of the sequences, int64 first sequences of the
# documents and one past the last, int8 modes of the sequences.
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version 1, dtype code, number of sequences, documents + 1
DTYPE_CODES = {"uint16": 8, "int32": 4}


@dataclass(frozen=True)
class Row:
    """One packed row. `trained` is never True for the first token of a conversation."""

    tokens: np.ndarray  # [n] int64, token ids only
    trained: np.ndarray  # [n] bool; True: the loss is taken on predicting this token
    conversation_lengths: np.ndarray  # [c] int64, sums to n
    sources: np.ndarray | None = None  # [c] int16, see `TokenizedRows.sources`
    reference: np.ndarray | None = None  # [trained tokens] float32, a reference's log-probability of each

    @property
    def spans(self) -> np.ndarray:
        """[c, 2] int64: the first token of each conversation, and one past its last. In preference data 2i is the chosen and
        2i + 1 the rejected conversation of a pair."""
        stops = np.cumsum(self.conversation_lengths)
        return np.stack([stops - self.conversation_lengths, stops], axis=1)


@dataclass(frozen=True)
class Index:
    """The contents of an .idx file."""

    dtype: np.dtype[Any]
    lengths: np.ndarray  # [segments] int32
    pointers: np.ndarray  # [segments] int64, byte offsets into the .bin file
    documents: np.ndarray  # [rows + 1] int64, first segment of each row
    modes: np.ndarray  # [segments] int8


def token_dtype(vocabulary_size: int) -> "np.dtype[Any]":
    """The dtype of token ids, by Megatron's rule: 2 bytes below 65,500 tokens, else 4."""
    return np.dtype(np.uint16 if vocabulary_size < 65500 else np.int32)


def data_file(prefix: Path, ending: str) -> Path:
    """`prefix` + `.bin`, `.idx` or `.json`; the prefix itself may have dots."""
    return prefix.with_name(f"{prefix.name}.{ending}")


def data_prefix(path: Path) -> Path:
    """The prefix, given it or one of its files."""
    endings = (".bin", ".idx", ".json")
    return path.with_name(path.stem) if path.suffix in endings else path


class TokenizedRows:
    """The rows of `prefix`.bin, .idx, .json, mapped into memory. Opening unfinished or damaged data is a `UserError`."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        if data_file(prefix, "json").is_file() and not any(data_file(prefix, ending).exists() for ending in ("bin", "idx")):
            raise UserError(
                f"{data_file(prefix, 'json')} has no .bin and .idx next to it: if it is chat data, tokenise it with bash "
                f"scripts/3_tokenize.sh MODEL {data_file(prefix, 'json')} LENGTH, and give the prefix that it prints"
            )
        self.manifest: dict[str, Any] = read_json(data_file(prefix, "json"), "manifest of tokenised data", REBUILD)
        check_data_manifest(data_file(prefix, "json"), self.manifest, FORMAT)
        check_sizes(self.files, REBUILD)
        self._index = read_index(data_file(prefix, "idx"))
        num_tokens = int(self._index.lengths.sum(dtype=np.int64))
        found = {"rows": len(self._index.documents) - 1, "tokens": num_tokens, "dtype": self._index.dtype.name}
        for name, value in found.items():
            if value != self.manifest.get(name):
                raise UserError(f"{prefix}.idx has {name} {value}, its manifest {self.manifest.get(name)}: {REBUILD}")
        check_structure(data_file(prefix, "idx"), self._index, self.manifest)
        self._tokens = np.memmap(data_file(prefix, "bin"), dtype=self._index.dtype, mode="r")
        if len(self._tokens) != num_tokens:
            raise UserError(f"{prefix}.bin has {len(self._tokens)} tokens, its .idx {num_tokens}: {REBUILD}")

    def __len__(self) -> int:
        return len(self._index.documents) - 1

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))

    @property
    def num_pairs(self) -> int:
        """The number of preference pairs, 0 in other data. Of every row of pairs, conversation 2i is the chosen and 2i + 1 the
        rejected one of the same pair."""
        return int(self.manifest.get("pairs", 0))

    @property
    def continues_group(self) -> np.ndarray:
        """[rows] bool, True: the row is in one row group with the row before it, so training shuffles them as one."""
        return (self._index.modes[self._index.documents[:-1]] & MODE_CONTINUES_GROUP) != 0

    @property
    def groups(self) -> np.ndarray | None:
        """[conversations] int64, the group of each in the order of the rows; None if they are not grouped."""
        if "groups" not in self.manifest["files"]:
            return None
        return np.fromfile(data_file(self.prefix, "groups"), dtype=np.int64)

    @cached_property
    def sources(self) -> np.ndarray | None:
        """[conversations] int16, the index of each one's source in the manifest's list; None if there is only one source."""
        if "sources" not in self.manifest["files"]:
            return None
        path = data_file(self.prefix, "sources")
        sources = np.fromfile(path, dtype=np.int16)
        if len(sources) != self.manifest["conversations"] or not np.all((sources >= 0) & (sources < self.num_sources)):
            raise UserError(f"{path} does not fit its manifest: {REBUILD}")
        return sources

    @property
    def num_sources(self) -> int:
        """The number of sources if each conversation's is known, else 0."""
        return len(self.manifest["sources"]) if "sources" in self.manifest["files"] else 0

    @cached_property
    def trained_per_row(self) -> np.ndarray:
        """[rows] int64, the number of trained tokens of each row."""
        trained = np.where((self._index.modes & MODE_TRAINED) != 0, self._index.lengths, 0)
        return np.add.reduceat(trained, self._index.documents[:-1], dtype=np.int64)

    @cached_property
    def _first_conversations(self) -> np.ndarray:
        """[rows] int64, the number of conversations before each row."""
        before = np.concatenate([[0], np.cumsum((self._index.modes & MODE_FIRST) != 0)])
        return np.asarray(before[self._index.documents[:-1]])

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        segments = slice(int(self._index.documents[index]), int(self._index.documents[index + 1]))
        lengths, modes = self._index.lengths[segments], self._index.modes[segments]
        start = int(self._index.pointers[segments.start]) // self._index.dtype.itemsize
        tokens = np.array(self._tokens[start : start + int(lengths.sum())], dtype=np.int64)
        trained = np.repeat((modes & MODE_TRAINED) != 0, lengths)
        firsts = np.flatnonzero(modes & MODE_FIRST)
        sources = None
        if self.sources is not None:
            before = int(self._first_conversations[index])
            sources = self.sources[before : before + len(firsts)]
        return Row(tokens, trained, np.add.reduceat(lengths, firsts, dtype=np.int64), sources)

    @property
    def files(self) -> Files:
        """The data files with their sizes and checksums, as the manifest has them."""
        return {data_file(self.prefix, ending): facts for ending, facts in self.manifest["files"].items()}


def is_finished(prefix: Path, fingerprint: str) -> bool:
    """Whether whole tokenised data with this fingerprint, a hash of all that decides the result, is in place; prints why other
    data there is replaced."""
    if not data_file(prefix, "json").is_file():
        return False
    try:
        is_same = bool(TokenizedRows(prefix).manifest.get("fingerprint") == fingerprint)
    except UserError as error:
        print(f"writing it again: {error}")
        return False
    if not is_same:
        print(f"writing it again: {prefix}.json is of other data, another tokenizer or other options")
    return is_same


def read_index(path: Path) -> Index:
    """Map an .idx file without copying it. One that is cut short or of another format is a `UserError`."""
    try:
        content = np.memmap(path, mode="r")
        magic, version, code, num_segments, num_documents = INDEX_HEADER.unpack(content[: INDEX_HEADER.size].tobytes())
    except (ValueError, OSError, struct.error):
        raise UserError(f"{path} is empty, cut short or cannot be read: {REBUILD}") from None
    names = {code: name for name, code in DTYPE_CODES.items()}
    if magic != INDEX_MAGIC or version != 1 or code not in names:
        raise UserError(f"{path} is not an index of tokenised data: {REBUILD}")
    if num_documents < 2 or num_segments < 1:
        raise UserError(f"{path} has no rows: {REBUILD}")
    if len(content) != INDEX_HEADER.size + 13 * num_segments + 8 * num_documents:
        raise UserError(f"{path} has {len(content)} bytes, not what its header says: {REBUILD}")
    parts, offset = [], INDEX_HEADER.size
    counts = (num_segments, num_segments, num_documents, num_segments)
    for kind, count in zip((np.int32, np.int64, np.int64, np.int8), counts, strict=True):
        parts.append(np.frombuffer(content, dtype=kind, count=count, offset=offset))
        offset += parts[-1].nbytes
    return Index(np.dtype(names[code]), *parts)


def write_index(path: Path, dtype: "np.dtype[Any]", lengths: np.ndarray, documents: np.ndarray, modes: np.ndarray) -> None:
    """Write an .idx file, byte for byte what megatron-core's IndexedDatasetBuilder(multimodal=True) writes, but without its
    lists of Python numbers. lengths, modes: [segments]; documents: as in `Index`."""
    pointers = _pointers(lengths, dtype)
    with open(path, "wb") as file:
        file.write(INDEX_HEADER.pack(INDEX_MAGIC, 1, DTYPE_CODES[dtype.name], len(lengths), len(documents)))
        for part, kind in ((lengths, np.int32), (pointers, np.int64), (documents, np.int64), (modes, np.int8)):
            file.write(np.ascontiguousarray(part, dtype=kind).tobytes())


def _pointers(lengths: np.ndarray, dtype: "np.dtype[Any]") -> np.ndarray:
    """[segments] int64: the byte offset of each segment in a .bin file that holds them one after another."""
    pointers = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
    return pointers * dtype.itemsize


def check_data_manifest(path: Path, manifest: Any, version: int) -> None:
    """Refuse a manifest that is not of tokenised data, or lacks what training takes from it."""
    if not isinstance(manifest, dict) or manifest.get("format") != version:
        raise UserError(f"{path} is not a manifest of tokenised data, format {version}: {REBUILD}")
    if not seal_holds(manifest):
        raise UserError(f"{path} is damaged (its checksum of itself differs): {REBUILD}")
    for name in COUNTS:
        value = manifest.get(name)
        if type(value) is not int or value < 0:
            raise UserError(f"{path} has {name} {value!r} instead of a whole number: {REBUILD}")
    pairs = manifest.get("pairs", 0)
    if type(pairs) is not int or pairs < 0 or (pairs and 2 * pairs != manifest["conversations"]):
        raise UserError(
            f"{path} has {manifest['conversations']} conversations and {pairs!r} pairs, not half of that: {REBUILD}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not {"bin", "idx"} <= files.keys() <= BYTES_PER_CONVERSATION.keys():
        raise UserError(f"{path} does not name the .bin and .idx files, or names unknown ones: {REBUILD}")
    for ending, facts in files.items():
        if not isinstance(facts, dict) or type(facts.get("bytes")) is not int or not _is_sha256(facts.get("sha256")):
            raise UserError(f"{path} has no size and checksum of .{ending}: {REBUILD}")
        size = BYTES_PER_CONVERSATION[ending]
        if size and facts["bytes"] != size * manifest["conversations"]:
            raise UserError(f"{path} has {manifest['conversations']} conversations, .{ending} another number: {REBUILD}")


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def check_structure(path: Path, index: Index, manifest: dict[str, Any]) -> None:
    """Refuse an .idx file whose rows do not cover the .bin file exactly, or whose modes no conversation can have."""
    lengths, documents, modes = index.lengths, index.documents, index.modes
    if documents[0] != 0 or documents[-1] != len(lengths) or not (documents[1:] > documents[:-1]).all():
        raise UserError(f"{path} has rows that do not follow one another: {REBUILD}")
    if not (lengths > 0).all():
        raise UserError(f"{path} has a segment without tokens: {REBUILD}")
    if not np.array_equal(_pointers(lengths, index.dtype), index.pointers):
        raise UserError(f"{path} has segments that do not follow one another in the .bin file: {REBUILD}")
    row_starts = documents[:-1]
    trained, first = (modes & MODE_TRAINED) != 0, (modes & MODE_FIRST) != 0
    known = MODE_TRAINED | MODE_FIRST | MODE_CONTINUES_GROUP
    continues_group = np.flatnonzero(modes & MODE_CONTINUES_GROUP)
    if (modes & ~known).any() or not np.isin(continues_group, row_starts[1:]).all():
        raise UserError(f"{path} has a segment of an unknown kind: {REBUILD}")
    if not first[row_starts].all():
        raise UserError(f"{path} has a row that does not begin with a conversation: {REBUILD}")
    if (trained & first).any():
        raise UserError(f"{path} marks the first token of a conversation as trained: {REBUILD}")
    if manifest.get("pairs"):
        if (np.add.reduceat(first, row_starts, dtype=np.int64) % 2).any():
            raise UserError(f"{path} has a row with half of a preference pair: {REBUILD}")
        if not np.logical_or.reduceat(trained, np.flatnonzero(first)).all():
            raise UserError(f"{path} has a side of a preference pair without a trained token: {REBUILD}")
    longest = int(np.add.reduceat(lengths, row_starts, dtype=np.int64).max())
    if longest > manifest["length"]:
        raise UserError(f"{path} has a row of {longest} tokens, its manifest says {manifest['length']}: {REBUILD}")
    found = {"conversations": int(first.sum()), "trained_tokens": int(lengths[trained].sum(dtype=np.int64))}
    for name, value in found.items():
        if value != manifest[name]:
            raise UserError(f"{path} has {name} {value}, its manifest {manifest[name]}: {REBUILD}")
