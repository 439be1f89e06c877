"""Manifests: the JSON file that a step writes last, which means that the step finished and lists what it wrote.

Also checksums, small files that appear whole or not at all, and free space.
"""

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

_SEAL = "sha256"  # the manifest's field with the checksum of its other fields
# Far more than a manifest, a configuration or a tokenizer has; parsed JSON takes many times its size in memory.
MAX_JSON_BYTES = 256 << 20
# Path of each file that a manifest names to {"bytes": its size, "sha256": its checksum}.
Files = Mapping[Path, Mapping[str, Any]]


def sha256_of_file(path: Path, report: Callable[[int], None] = lambda num_bytes: None) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces of 8 MiB; `report` gets the size of each."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
            report(len(piece))
    return digest.hexdigest()


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with a checksum of its content."""
    return {**manifest, _SEAL: _content_sum(manifest)}


def seal_holds(manifest: Mapping[str, Any]) -> bool:
    """Whether the content of a sealed manifest is what was sealed."""
    return bool(manifest.get(_SEAL) == _content_sum(manifest))


def _content_sum(manifest: Mapping[str, Any]) -> str:
    content = json.loads(json.dumps({name: value for name, value in manifest.items() if name != _SEAL}))
    return sha256_of_text(json.dumps(content, sort_keys=True, separators=(",", ":")))


def listed_files(folder: Path, manifest: Path, files: Any) -> Files:
    """The files that a manifest names; `files` is its field with them, not yet checked.

    `UserError` if it is not of that form, or a file lies outside `folder` (a manifest may come from someone else).
    """
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
    """`UserError`, ending in `advice`, for the first file that is missing or whose size is not its manifest's."""
    for path, facts in files.items():
        if not path.is_file():
            raise UserError(f"{path} is missing, which the manifest next to it names: {advice}")
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise UserError(f"{path} has {size} bytes, its manifest says {facts['bytes']}: {advice}")


def check_sums(files: Files, advice: str, report: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Hash the files, several at a time. `UserError`, ending in `advice`, for the first that cannot be read or whose checksum
    is not its manifest's. report: as in `sha256_of_file`, called from several threads.
    """

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


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file so that a reader, or the disk after a crash, has the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str, next_step: str) -> Any:
    """Read a JSON file. `UserError`, with `what` it is and the `next_step`, if it is missing, damaged or huge."""
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


def gigabytes(num_bytes: int) -> str:
    """`3.55 GB`; small sizes in MB."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def check_free_space(folder: Path, num_bytes: int, what: str) -> None:
    """`UserError`, with both sizes, if fewer than `num_bytes` are free for `what` on the disk of `folder` or, if that does
    not exist, of its nearest parent.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"{what} needs {gigabytes(num_bytes)}, {folder} has {gigabytes(free)} free: "
            "make room there, or give an output folder on another disk"
        )
