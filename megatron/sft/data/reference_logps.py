"""A reference model's log-probabilities next to tokenised data.

`prefix`.bin has a float32 for every trained token in the order of the rows, `prefix`.json is a sealed manifest that says of
which data they are, of which checkpoint, and in which precision.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron.sft.data.tokenized import TokenizedRows, data_file
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import Files, check_sizes, listed_files, read_json, seal_holds, sealed, write_json

FORMAT = 1
MAKE_AGAIN = "make them again with `bash scripts/4_train.sh reference`"
DTYPE = np.dtype("<f4")


def data_seal(rows: TokenizedRows) -> dict[str, Any]:
    """What identifies tokenised data, its packing included, for the log-probabilities of it."""
    sums = {f"{ending}_sha256": rows.manifest["files"][ending]["sha256"] for ending in ("bin", "idx")}
    return {"prefix": str(rows.prefix), "length": rows.manifest["length"], **sums}


def checkpoint_seal(path: Path, sha256: str) -> dict[str, Any]:
    """What identifies the reference: a checksum that names its weights."""
    return {"path": str(path), "sha256": sha256}


def check_reference_manifest(path: Path, manifest: Any) -> None:
    """Refuse a manifest that is damaged or of something else."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or "reference_of" not in manifest:
        raise UserError(f"{path} is not a manifest of reference log-probabilities, format {FORMAT}: {MAKE_AGAIN}")
    if not seal_holds(manifest):
        raise UserError(f"{path} is damaged (its checksum of itself differs): {MAKE_AGAIN}")


class ReferenceLogps:
    """The log-probabilities under `prefix` of the trained tokens of `rows`. Unfinished or damaged ones are a `UserError`."""

    def __init__(self, prefix: Path, rows: TokenizedRows) -> None:
        self.prefix = prefix
        path = data_file(prefix, "json")
        self.manifest: dict[str, Any] = read_json(path, "manifest of reference log-probabilities", MAKE_AGAIN)
        check_reference_manifest(path, self.manifest)
        check_sizes(self.files, MAKE_AGAIN)
        self._rows = rows

    @property
    def files(self) -> Files:
        """The .bin file with its size and checksum."""
        return listed_files(self.prefix.parent, data_file(self.prefix, "json"), self.manifest.get("files"))

    def check_made_for(self, wanted: Mapping[str, Any]) -> None:
        """Refuse log-probabilities of another model, of other data, or of another precision than `wanted`, a `reference_of`."""
        made = self.manifest["reference_of"]
        data, of_data = made["data"], wanted["data"]
        here, ways = f"the reference log-probabilities {data_file(self.prefix, 'json')}", "set REFERENCE_LOGPS to another place"
        if any(data[name] != of_data[name] for name in ("bin_sha256", "idx_sha256")):
            raise UserError(
                f"{here} are of other data than {of_data['prefix']} holds: rows of up to {data['length']} tokens, checksums "
                f"{data['bin_sha256'][:12]}… and {data['idx_sha256'][:12]}…; {MAKE_AGAIN}, or {ways}"
            )
        model, of_model = made["checkpoint"], wanted["checkpoint"]
        if model["sha256"] != of_model["sha256"]:
            raise UserError(
                f"{here} are of the model {model['path']} (checksum {model['sha256'][:12]}…), this run's reference is "
                f"{of_model['path']} ({of_model['sha256'][:12]}…): set REFERENCE={model['path']} to be held to that one, "
                f"{MAKE_AGAIN} for this one, or {ways}"
            )
        if made["precision"] != wanted["precision"]:
            raise UserError(
                f"{here} were made in {made['precision']}, this run computes in {wanted['precision']}: set PRECISION="
                f"{made['precision'].partition(' ')[0]}, {MAKE_AGAIN}, or {ways}"
            )
        trained = self._rows.manifest["trained_tokens"]
        num_bytes = trained * DTYPE.itemsize
        if [facts["bytes"] for facts in self.files.values()] != [num_bytes]:
            raise UserError(f"{here} are not of {trained} trained tokens ({num_bytes} bytes): {MAKE_AGAIN}")

    @cached_property
    def _values(self) -> np.ndarray:
        return np.memmap(data_file(self.prefix, "bin"), dtype=DTYPE, mode="r")

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self._rows.trained_per_row)])

    def of_row(self, index: int) -> np.ndarray:
        """[trained tokens of the row] float32."""
        return np.array(self._values[self._starts[index] : self._starts[index + 1]])


class LogpsFile:
    """Log-probabilities that are being written: appended to a hidden file, with a record of how far it is and the checksum so
    far.

    rows, tokens: what it has, from the first row on; an interrupted pass of the same reference continues there.
    """

    def __init__(self, prefix: Path, reference_of: dict[str, Any]) -> None:
        self.prefix, self.reference_of = prefix, reference_of
        self.rows, self.tokens = 0, 0
        self._bin, self._record = (prefix.with_name(f".{prefix.name}.partial.{ending}") for ending in ("bin", "json"))
        self._digest = hashlib.sha256()
        self._continue()
        self._file: IO[bytes] = open(self._bin, "r+b" if self.rows else "w+b")  # noqa: SIM115
        self._file.truncate(self.tokens * DTYPE.itemsize)
        self._file.seek(0, os.SEEK_END)

    def _continue(self) -> None:
        """Take over what an interrupted pass of the same reference has left, if it is what the record says."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(self._record.read_text(encoding="utf-8"))
            if record["reference_of"] != json.loads(json.dumps(self.reference_of)):
                return
            digest, left = hashlib.sha256(), int(record["tokens"]) * DTYPE.itemsize
            with open(self._bin, "rb") as file:
                while left and (piece := file.read(min(left, 8 << 20))):
                    digest.update(piece)
                    left -= len(piece)
            if not left and digest.hexdigest() == record["sha256"]:
                self.rows, self.tokens, self._digest = int(record["rows"]), int(record["tokens"]), digest

    def append(self, values: np.ndarray, num_rows: int) -> None:
        """values: [trained tokens of the next `num_rows` rows]."""
        content = values.astype(DTYPE).tobytes()
        self._file.write(content)
        self._digest.update(content)
        self.rows, self.tokens = self.rows + num_rows, self.tokens + len(values)

    def keep(self) -> None:
        """Make what there is the point that a later pass continues from."""
        self._file.flush()
        os.fsync(self._file.fileno())
        record = {"reference_of": self.reference_of, "rows": self.rows, "tokens": self.tokens}
        write_json(self._record, {**record, "sha256": self._digest.hexdigest()})

    def finish(self, made_with: dict[str, Any]) -> None:
        """Put the finished files in place, the manifest last."""
        self.keep()
        self._file.close()
        manifest_path, path = data_file(self.prefix, "json"), data_file(self.prefix, "bin")
        manifest_path.unlink(missing_ok=True)
        os.replace(self._bin, path)
        facts = {"bytes": self.tokens * DTYPE.itemsize, "sha256": self._digest.hexdigest()}
        content = {"format": FORMAT, "reference_of": self.reference_of, "trained_tokens": self.tokens, "made_with": made_with}
        write_json(manifest_path, sealed(content | {"files": {path.name: facts}}))
        self._record.unlink()
