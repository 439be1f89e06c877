"""The files of a tokenizer in a Hugging Face folder, and checksums that identify a tokenizer and a chat template."""

import json
from pathlib import Path

from megatron.sft.runtime.manifest import sha256_of_file, sha256_of_text

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")


def tokenizer_sha256(folder: Path) -> str | None:
    """SHA-256 of tokenizer.json, or of the hashes of the other vocabulary files; None in a folder without any."""
    hashes = {name: sha256_of_file(folder / name) for name in VOCABULARY_FILES if (folder / name).is_file()}
    if not hashes:
        return None
    return hashes.get("tokenizer.json") or sha256_of_text(repr(sorted(hashes.items())))


def chat_template_sha256(folder: Path) -> str | None:
    """SHA-256 of the text of the folder's chat template, None without one."""
    text = read_chat_template(folder)
    return None if text is None else sha256_of_text(text)


def read_chat_template(folder: Path) -> str | None:
    """The template that transformers uses: chat_template.jinja, else the (default) one of tokenizer_config.json, else None."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    try:
        template = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(template, list):  # several, by name
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return template if isinstance(template, str) else None
