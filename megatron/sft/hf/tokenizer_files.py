"""The files of a tokenizer in a Hugging Face folder: their tokens, and checksums that identify a tokenizer and a chat template.

The ids are tokenizer.json's. Tokens that only the other files name (`added_tokens_decoder`, `pad_token`, …) follow it, in the
order in which transformers adds them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron.sft.hf.sentencepiece_model import MODEL, converted
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import read_json, sha256_of_file, sha256_of_text

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
VOCABULARY_FILES = (TOKENIZER, MODEL, "vocab.json", "vocab.txt", "merges.txt")
_NEXT_STEP = "download the model again"
# transformers' order of the special tokens that have a name; others (image_token, …) follow.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class _Vocabulary:
    """What tokenizer.json says of tokens. size: one more than its largest id; free: the id of the next token added."""

    known: frozenset[str]
    size: int
    free: int


def has_own_ids(folder: Path) -> bool:
    """Whether the ids come from a file that is read as it is, tokenizer.json or sentencepiece's; else from transformers."""
    return (folder / TOKENIZER).is_file() or (folder / MODEL).is_file()


def num_tokens(folder: Path) -> int:
    """One more than the largest token id, 0 without a vocabulary file that is read as it is."""
    if not has_own_ids(folder):
        return 0
    return max([_vocabulary(folder).size, *(token["id"] + 1 for token in tokens_to_add(folder))])


def tokenizer_json(folder: Path) -> str:
    """The content of tokenizer.json, made of tokenizer.model where there is none."""
    if (folder / TOKENIZER).is_file():
        return (folder / TOKENIZER).read_text(encoding="utf-8")
    return converted(folder, _optional_json(folder / CONFIG))


def tokens_to_add(folder: Path) -> list[dict[str, Any]]:
    """The tokens that a folder's tokenizer.json lacks, as it would list them: `id`, `content`, `special` and the other flags.

    A `UserError` where a file states another id than the next free one.
    """
    known, free = set(_vocabulary(folder).known), _vocabulary(folder).free
    added: list[dict[str, Any]] = []
    for stated, token in _named_tokens(folder):
        if token["content"] in known:
            continue
        known.add(token["content"])
        if stated is not None and stated != free:
            raise UserError(
                f"{folder} gives the token {token['content']!r} id {stated}, but {TOKENIZER} lacks it and its next free id is "
                f"{free}: add the token to {TOKENIZER}, or remove it from {CONFIG}"
            )
        added.append({"id": free, **token})
        free += 1
    return added


def _vocabulary(folder: Path) -> _Vocabulary:
    path = next(folder / name for name in (TOKENIZER, MODEL) if (folder / name).is_file())
    return _read_vocabulary(path, path.stat().st_mtime_ns, path.stat().st_size)


@lru_cache(maxsize=1)  # reading one takes a second, and several parts of a command ask
def _read_vocabulary(path: Path, modified: int, num_bytes: int) -> _Vocabulary:
    if path.name == TOKENIZER:
        content = read_json(path, "tokenizer", _NEXT_STEP)
    else:
        content = json.loads(tokenizer_json(path.parent))
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a tokenizer: {_NEXT_STEP}")
    vocabulary = content.get("model", {}).get("vocab", {})
    added = {token["content"]: int(token["id"]) for token in content.get("added_tokens", [])}
    if not isinstance(vocabulary, dict):  # a list of tokens with their scores
        vocabulary = {entry[0]: id for id, entry in enumerate(vocabulary)}
    largest = max([*vocabulary.values(), *added.values()], default=-1)
    # As the tokenizers library numbers them: after all of the model's tokens and all added ones.
    free = max([len(vocabulary), *(id + 1 for id in added.values())])
    return _Vocabulary(frozenset(vocabulary) | added.keys(), largest + 1, free)


def _named_tokens(folder: Path) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """(id if one is stated, token with its flags) of the files next to tokenizer.json, in transformers' order of adding."""
    config = _optional_json(folder / CONFIG)
    stated = config.get("added_tokens_decoder")
    if stated is None:  # transformers reads these files of older versions only then
        config = config | _optional_json(folder / "special_tokens_map.json")
        special = {_flags(value)["content"] for value in _special_tokens(config)}
        for content, id in sorted(_optional_json(folder / "added_tokens.json").items(), key=lambda item: int(item[1])):
            yield (int(id), _flags({"content": content, "special": content in special, "normalized": content not in special}))
    for id, token in sorted((stated or {}).items(), key=lambda item: int(item[0])):
        yield int(id), _flags(token)
    for token in _special_tokens(config):
        yield None, _flags(token)


def _special_tokens(config: dict[str, Any]) -> Iterator[Any]:
    others = sorted(name for name in config if name.endswith("_token") and name not in _NAMED)
    for value in map(config.get, (*_NAMED, *others)):
        if isinstance(value, str) or (isinstance(value, dict) and "content" in value):
            yield value
    for name in ("additional_special_tokens", "extra_special_tokens"):
        values = config.get(name) or []
        yield from values.values() if isinstance(values, dict) else values


def _flags(token: Any) -> dict[str, Any]:
    """A token with all flags, of its text or of some flags."""
    given = {"content": token, "special": True} if isinstance(token, str) else {"special": True, **token}
    default = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not given["special"]}
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: (default | given)[name] for name in names}


def _optional_json(path: Path) -> dict[str, Any]:
    content = read_json(path, "tokenizer file", _NEXT_STEP) if path.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: {_NEXT_STEP}")
    return content


def tokenizer_sha256(folder: Path) -> str | None:
    """SHA-256 of tokenizer.json with the tokens that follow it, or of the hashes of the other vocabulary files; None in a
    folder without any."""
    hashes = {name: sha256_of_file(folder / name) for name in VOCABULARY_FILES if (folder / name).is_file()}
    if not hashes:
        return None
    if not has_own_ids(folder):
        return sha256_of_text(repr(sorted(hashes.items())))
    files = hashes.get(TOKENIZER) or sha256_of_text(repr(sorted(hashes.items())))
    added = [token["content"] for token in tokens_to_add(folder)]
    return sha256_of_text(repr((files, added))) if added else files


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
