"""Edits a tokenizer and its chat template in all files of a model folder together. `bash tools/edit_tokenizer HF_DIR …` runs

python -m megatron.sft.edit_tokenizer HF_DIR --rename '<|quad_start|>=<short>' --keep-thinking
"""

import argparse
import difflib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.sft.chat.corrections import check_keeps_thinking, keep_thinking
from megatron.sft.chat.template_settings import chosen_template
from megatron.sft.hf.tokenizer import read_tokenizer
from megatron.sft.hf.tokenizer_files import num_tokens, read_chat_template, tokens_to_add
from megatron.sft.runtime.console import SIGNS
from megatron.sft.runtime.errors import UserError, run
from megatron.sft.runtime.manifest import write_text

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL, ADDED, TEMPLATE = "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"
ORIGINAL = ".orig"  # the suffix of a file's copy from before its first edit
# Of a new token: not special, so that it stays visible where special tokens are skipped.
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    files = TokenizerFiles(arguments.hf_dir)
    for pair in arguments.rename:
        old, equals, new = pair.partition("=")
        if not (old and equals and new):
            raise UserError(f"--rename {pair!r} is not OLD=NEW: quote it, like --rename '<|quad_start|>=<short>'")
        files.rename(old, new)
    for token in arguments.add_token:
        files.add(token)
    if arguments.template:
        files.set_template(chosen_template(arguments.template))
    if arguments.keep_thinking:
        files.set_template(keep_thinking(files.template_text()))
    files.write(arguments.keep_thinking)
    return 0


class TokenizerFiles:
    """The files of one tokenizer, changed in memory until `write`. `UserError` if they are missing or not valid JSON."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = [name for name in (TOKENIZER, CONFIG, SPECIAL, ADDED, TEMPLATE) if (folder / name).is_file()]
        self.before = {name: (folder / name).read_text(encoding="utf-8") for name in names}
        if TOKENIZER not in self.before:
            raise UserError(f"{folder} has no {TOKENIZER}: give a model or tokenizer folder (scripts/1_download.sh)")
        try:
            self.content: dict[str, Any] = {n: json.loads(text) for n, text in self.before.items() if n != TEMPLATE}
        except json.JSONDecodeError as error:
            raise UserError(f"a tokenizer file in {folder} is not JSON ({error}): download the model again") from None
        self.template = self.before.get(TEMPLATE)
        self.messages: list[str] = []

    @property
    def added(self) -> list[dict[str, Any]]:
        """The added tokens of tokenizer.json, each with `content` and `id`."""
        tokens: list[dict[str, Any]] = self.content[TOKENIZER].setdefault("added_tokens", [])
        return tokens

    def _token(self, name: str) -> dict[str, Any] | None:
        return next((token for token in self.added if token["content"] == name), None)

    def _in_vocabulary(self, name: str) -> bool:
        vocabulary = self.content[TOKENIZER].get("model", {}).get("vocab", {})
        return name in vocabulary if isinstance(vocabulary, dict) else any(entry[0] == name for entry in vocabulary)

    def template_text(self) -> str:
        """The chat template as it is now. `UserError` if there is none."""
        text = self.content.get(CONFIG, {}).get("chat_template") if self.template is None else self.template
        if not isinstance(text, str):
            raise UserError(f"{self.folder} has no chat template: give one with --template")
        return text

    def rename(self, old: str, new: str) -> None:
        """Give the unused added token `old` the name `new`; it keeps its id and becomes an ordinary token.

        `UserError` if there is no such token, it is in use, or `new` exists.
        """
        entry, present = self._token(old), self._token(new)
        if entry is None and present is not None and self._was_renamed(old, present["id"]):
            self.messages.append(f"{old} is already {new} (id {present['id']})")
            return
        if entry is None:
            known = ", ".join(token["content"] for token in self.added[:8])
            raise UserError(f"the tokenizer in {self.folder} has no added token {old!r}: choose one of {known}, …")
        if present is not None or self._in_vocabulary(new):
            raise UserError(f"the tokenizer in {self.folder} already has a token {new!r}: choose another name")
        self._check_unused(old)
        entry.update(content=new, special=False)
        for mapping in (self.content[TOKENIZER].get("model", {}).get("vocab"), self.content.get(ADDED)):
            if isinstance(mapping, dict) and old in mapping:
                items = [(new if name == old else name, token_id) for name, token_id in mapping.items()]
                mapping.clear()  # filled again, so that the order stays
                mapping.update(items)
        decoder = self.content.get(CONFIG, {}).get("added_tokens_decoder", {})
        if str(entry["id"]) in decoder:
            decoder[str(entry["id"])].update(content=new, special=False)
        for name in (CONFIG, SPECIAL):
            _drop_from_special(self.content.get(name, {}), old)
        self.messages.append(f"{old} is {new} now (id {entry['id']}), an ordinary token")

    def _was_renamed(self, old: str, token_id: int) -> bool:
        """Whether `old` has this id in the original from before the first edit."""
        path = self.folder / (TOKENIZER + ORIGINAL)
        if not path.exists():
            return False
        tokens = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
        return any(token["content"] == old and token["id"] == token_id for token in tokens)

    def _check_unused(self, token: str) -> None:
        places = []
        for name in (CONFIG, SPECIAL):
            for field, value in self.content.get(name, {}).items():
                text = value.get("content") if isinstance(value, dict) else value
                if field.endswith("_token") and text == token:
                    places.append(f"{field} in {name}")
        template = json.dumps(self.content.get(CONFIG, {}).get("chat_template", ""), ensure_ascii=False)
        if token in (self.template or "") or token in template:
            places.append("the chat template")
        quoted = json.dumps(token, ensure_ascii=False)
        for part in ("post_processor", "normalizer", "pre_tokenizer", "decoder"):
            if quoted in json.dumps(self.content[TOKENIZER].get(part), ensure_ascii=False):
                places.append(f"the {part.replace('_', '-')}")
        if places:
            raise UserError(f"token {token!r} is in use ({', '.join(places)}): choose one that nothing needs")

    def add(self, name: str) -> None:
        """Append a token with the next free id, unless there is one of this name."""
        others = {token["content"] for token in tokens_to_add(self.folder)}
        if self._token(name) is not None or self._in_vocabulary(name) or name in others:
            self.messages.append(f"{name} exists already")
            return
        # Tokens that only the other files name come first: their ids are taken.
        self.added.extend(token for token in tokens_to_add(self.folder) if self._token(token["content"]) is None)
        token_id = max(num_tokens(self.folder), 1 + max((token["id"] for token in self.added), default=-1))
        self.added.append({"id": token_id, "content": name, **_FLAGS})
        decoder = self.content.get(CONFIG, {}).get("added_tokens_decoder")
        if decoder is not None:
            decoder[str(token_id)] = {"content": name, **_FLAGS}
        if ADDED in self.content:
            self.content[ADDED][name] = token_id
        self.messages.append(f"{name} is added (id {token_id}){self._embedding_note(token_id)}")

    def _embedding_note(self, token_id: int) -> str:
        try:
            size = int(json.loads((self.folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
        except (OSError, ValueError, KeyError):
            return ""  # a folder with a tokenizer alone
        if token_id < size:
            return f": the model's embedding has a row for it, one of {size:,}"
        return ": scripts/2_convert.sh adds a row for it, near the mean of the others"

    def set_template(self, text: str) -> None:
        """Put a template in the file where the folder has its template: chat_template.jinja, tokenizer_config.json or both."""
        config = self.content.get(CONFIG)
        if config is not None and ("chat_template" in config or self.template is None):
            config["chat_template"] = text
        if config is None or self.template is not None:
            self.template = text

    def write(self, keeps_thinking: bool) -> None:
        """Check the new files in a copy, print the difference, keep the originals, and write.

        `UserError`, with nothing changed, if transformers cannot load them or an added token is not one token.
        """
        after = {
            name: text
            for name, content in self.content.items()
            if (text := _as_text(content)) != _as_text(json.loads(self.before[name]))
        }
        if self.template is not None and self.template != self.before.get(TEMPLATE):
            after[TEMPLATE] = self.template
        for message in self.messages:
            print(message)
        if not after:
            print(f"{self.folder}: nothing to change")
            return
        self._check_copy(after, keeps_thinking)
        for name, text in after.items():
            print(_difference(name, self.before.get(name, ""), text))
            original = self.folder / (name + ORIGINAL)
            if name in self.before and not original.exists():
                shutil.copyfile(self.folder / name, original)
        for name, text in after.items():
            write_text(self.folder / name, text)
        print(f"changed {', '.join(after)} in {self.folder}; the originals are kept as *{ORIGINAL}")

    def _check_copy(self, after: dict[str, str], keeps_thinking: bool) -> None:
        with tempfile.TemporaryDirectory() as name:
            copy = Path(name)
            for path in self.folder.iterdir():
                if path.name not in after:
                    (copy / path.name).symlink_to(path.resolve())
            for file, text in after.items():
                (copy / file).write_text(text, encoding="utf-8")
            try:
                tokenizer = read_tokenizer(copy)
            except UserError as error:
                raise UserError(f"the new tokenizer cannot be loaded ({error}): nothing was changed") from None
            for token in self.added:
                content, token_id = token["content"], token["id"]
                if tokenizer.encode(content, add_special_tokens=False) != [token_id]:
                    raise UserError(f"{content!r} would not be one token with id {token_id}: nothing was changed")
            if keeps_thinking:
                check_keeps_thinking(tokenizer, read_chat_template(copy) or "", str(self.folder))


def _drop_from_special(config: dict[str, Any], token: str) -> None:
    for field in ("additional_special_tokens", "extra_special_tokens"):
        values = config.get(field)
        if isinstance(values, list):
            config[field] = [v for v in values if (v.get("content") if isinstance(v, dict) else v) != token]


def _as_text(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _difference(name: str, before: str, after: str) -> str:
    """A unified diff; of tokenizer.json the added tokens only. Templates are split at their tags: many are one long line."""
    if name == TOKENIZER:
        parts = (json.loads(before), json.loads(after))
        before, after = (_as_text({"added_tokens": part.get("added_tokens", [])}) for part in parts)
    elif name != TEMPLATE:
        before = _as_text(json.loads(before)) if before else ""
    old, new = (text.replace("%}", "%}\n").replace("}}", "}}\n").splitlines() for text in (before, after))
    return "\n".join(difflib.unified_diff(old, new, f"{name}{ORIGINAL}", name, lineterm="", n=1)).translate(SIGNS)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="edit_tokenizer", description=__doc__)
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR")
    parser.add_argument("--rename", action="append", default=[], metavar="OLD=NEW")
    parser.add_argument("--add-token", action="append", default=[], metavar="NEW")
    parser.add_argument("--keep-thinking", action="store_true")
    parser.add_argument("--template", metavar="chatml|FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
