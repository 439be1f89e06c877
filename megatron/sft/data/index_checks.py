"""What must hold of tokenised data whatever its checksums say: checked each time it is opened, at memory speed."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron.sft.errors import UserError
from megatron.sft.manifest import seal_holds

if TYPE_CHECKING:
    from megatron.sft.data.tokenized import Index

REBUILD = "run scripts/3_tokenize.sh again"
MODE_TRAINED = 1  # the loss is taken on predicting the tokens of this segment
MODE_FIRST = 2  # the first segment of a conversation
MODE_JOINED = 4  # the first segment of a row that training must keep together with the row before it
# Of the manifest: what it must say, as whole numbers.
COUNTS = ("rows", "tokens", "length", "conversations", "trained_tokens", "max_token_id")
# Files beside the manifest, and the bytes that each has a conversation, where that is known.
BYTES_A_CONVERSATION = {"bin": None, "idx": None, "groups": 8, "sources": 2}


def check_manifest(path: Path, manifest: Any, version: int) -> None:
    """Refuse a manifest that is not of tokenised data, or that lacks what training takes from it."""
    if not isinstance(manifest, dict) or manifest.get("format") != version:
        raise UserError(f"{path} is not a manifest of tokenised data, format {version}: {REBUILD}")
    if not seal_holds(manifest):
        raise UserError(f"{path} is damaged (its checksum of itself differs): {REBUILD}")
    for name in COUNTS:
        value = manifest.get(name)
        if type(value) is not int or value < 0:
            raise UserError(f"{path} says {name} {value!r} where a whole number belongs: {REBUILD}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not {"bin", "idx"} <= files.keys() <= BYTES_A_CONVERSATION.keys():
        raise UserError(f"{path} does not name the .bin and .idx files, or names others: {REBUILD}")
    for ending, facts in files.items():
        if not isinstance(facts, dict) or type(facts.get("bytes")) is not int or not _is_sha256(facts.get("sha256")):
            raise UserError(f"{path} has no size and checksum of .{ending}: {REBUILD}")
        each = BYTES_A_CONVERSATION[ending]
        if each and facts["bytes"] != each * manifest["conversations"]:
            raise UserError(
                f"{path} has {manifest['conversations']} conversations, not as many in .{ending}: {REBUILD}"
            )


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def check_structure(path: Path, index: "Index", manifest: dict[str, Any]) -> None:
    """Refuse an .idx file whose rows do not tile the .bin file, or that marks what no conversation has as trained."""
    lengths, documents, modes = index.lengths, index.documents, index.modes
    if documents[0] != 0 or documents[-1] != len(lengths) or not (documents[1:] > documents[:-1]).all():
        raise UserError(f"{path} has rows that do not follow one another: {REBUILD}")
    if not (lengths > 0).all():
        raise UserError(f"{path} has a segment without tokens: {REBUILD}")
    pointers = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
    pointers *= index.dtype.itemsize
    if not np.array_equal(pointers, index.pointers):
        raise UserError(f"{path} has segments that do not lie one after another in the .bin file: {REBUILD}")
    row_starts = documents[:-1]
    trained, first = (modes & MODE_TRAINED) != 0, (modes & MODE_FIRST) != 0
    known = MODE_TRAINED | MODE_FIRST | MODE_JOINED
    joined = np.flatnonzero(modes & MODE_JOINED)
    if (modes & ~known).any() or not np.isin(joined, row_starts[1:]).all():
        raise UserError(f"{path} has a segment of an unknown kind: {REBUILD}")
    if not first[row_starts].all():
        raise UserError(f"{path} has a row that does not begin with a conversation: {REBUILD}")
    if (trained & first).any():
        raise UserError(f"{path} marks the first token of a conversation as trained: {REBUILD}")
    longest = int(np.add.reduceat(lengths, row_starts, dtype=np.int64).max())
    if longest > manifest["length"]:
        raise UserError(f"{path} has a row of {longest} tokens, its manifest says {manifest['length']}: {REBUILD}")
    found = {"conversations": int(first.sum()), "trained_tokens": int(lengths[trained].sum(dtype=np.int64))}
    for name, value in found.items():
        if value != manifest[name]:
            raise UserError(f"{path} has {name} {value}, its manifest {manifest[name]}: {REBUILD}")
