"""Manifests: the JSON file that a step writes last, which says that the step finished and what it wrote."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron.sft.runtime.errors import UserError

# A manifest, a configuration or a tokenizer is far smaller; JSON takes many times its size in memory.
_SEAL = "sha256"
MAX_JSON_BYTES = 256 << 20
# Of each file that a manifest names: {"bytes": its size, "sha256": its checksum}.
Files = Mapping[Path, Mapping[str, Any]]


def sha256_of_file(path: Path, report: Callable[[int], None] = lambda num_bytes: None) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces of 8 MiB; `report` is told of each."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
            report(len(piece))
    return digest.hexdigest()


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with a checksum of its own content."""
    return {**manifest, _SEAL: _content_sum(manifest)}


def seal_holds(manifest: Mapping[str, Any]) -> bool:
    """Whether the manifest says what it said when it was written."""
    return bool(manifest.get(_SEAL) == _content_sum(manifest))


def _content_sum(manifest: Mapping[str, Any]) -> str:
    content = json.loads(json.dumps({name: value for name, value in manifest.items() if name != _SEAL}))
    return sha256_of_text(json.dumps(content, sort_keys=True, separators=(",", ":")))


def listed_files(folder: Path, manifest: Path, files: Any) -> Files:
    """The files that a manifest names, none of which may lie outside `folder`; `files` is what it says of them."""
    known = isinstance(files, dict) and all(
        isinstance(facts, dict) and type(facts.get("bytes")) is int and isinstance(facts.get("sha256"), str)
        for facts in files.values()
    )
    if not known:
        raise UserError(f"{manifest} does not list files with their sizes and checksums: it is damaged")
    inside = folder.resolve()
    for name in files:
        if "\0" in name or not (folder / name).resolve().is_relative_to(inside):
            raise UserError(f"{manifest} names {name!r}, which lies outside {folder}: do not use it")
    return {folder / name: facts for name, facts in files.items()}


def check_sizes(files: Files, advice: str) -> None:
    """The first file that is missing or has another size than its manifest says is a `UserError`."""
    for path, facts in files.items():
        if not path.is_file():
            raise UserError(f"{path} is missing, which the manifest beside it names: {advice}")
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise UserError(f"{path} has {size} bytes, its manifest says {facts['bytes']}: {advice}")


def check_sums(files: Files, advice: str, report: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Read the files, several at a time; the first whose checksum is not as its manifest says is a `UserError`."""

    def checksum(path: Path) -> str:
        try:
            return sha256_of_file(path, report)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): {advice}") from None

    with ThreadPoolExecutor() as pool:
        for path, found in zip(files, pool.map(checksum, files), strict=True):
            if found != files[path]["sha256"]:
                raise UserError(f"{path} is damaged (its checksum differs from its manifest's): {advice}")


def sha256_of_text(text: str) -> str:
    """Hexadecimal SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new one, never a part: beside, flushed, renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str, next_step: str) -> Any:
    """Read a JSON file. A missing or damaged one is a `UserError` that says `what` it is and the `next_step`."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES >> 20} MiB")
        return json.loads(text)
    except FileNotFoundError:
        raise UserError(f"{what} {path} is missing: {next_step}") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror}): {next_step}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} {path} is not valid JSON ({error}): {next_step}") from None


def check_free_space(folder: Path, num_bytes: int, what: str) -> None:
    """A `UserError` with both numbers if the disk of `folder` (or of the nearest parent that exists) is too small."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"{what} needs {num_bytes / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free: "
            "make room there, or give an output folder on another disk"
        )
