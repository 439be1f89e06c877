"""Manifests: the JSON file that a step writes last, which says that the step finished and what it wrote."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from megatron.sft.errors import UserError


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces of 8 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sha256_of_text(text: str) -> str:
    """Hexadecimal SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new one, never a part: beside, flushed, renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path: Path, content: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str, next_step: str) -> Any:
    """Read a JSON file. A missing or damaged one is a `UserError` that says `what` it is and the `next_step`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what} {path} is missing: {next_step}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} is not valid JSON ({error}): {next_step}") from None
