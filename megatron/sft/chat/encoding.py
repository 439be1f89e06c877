"""Tokens of rendered conversations, and which of them are trained, by the character offsets of one tokenization."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from megatron.sft.chat.bpe_cache import WordEncoder
from megatron.sft.chat.conversations import Example
from megatron.sft.chat.skeleton import Answer
from megatron.sft.chat.template import ChatTemplate, RenderedText, no_template, template_of
from megatron.sft.hf.tokenizer import read_tokenizer
from megatron.sft.hf.tokenizer_files import VOCABULARY_FILES
from megatron.sft.runtime.errors import UserError

TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True)
class Conversation:
    """The tokens of one record. `mask_run_lengths` add up to their number: not trained, trained, not trained, and so on;
    the first is at least 1, as nothing predicts the first token."""

    tokens: np.ndarray  # [n] int64
    mask_run_lengths: list[int]
    num_merged_starts: int = 0  # answers whose first token also holds the end of the header, and is not trained
    group: int | None = None  # the group_hash of its record
    source: int = 0  # index of its source among the inputs

    def cut(self, length: int) -> "Conversation":
        """The first `length` tokens."""
        starts = [0, *accumulate(self.mask_run_lengths)]
        runs = [min(run, length - start) for run, start in zip(self.mask_run_lengths, starts, strict=False) if start < length]
        return replace(self, tokens=self.tokens[:length], mask_run_lengths=runs)

    def pieces(self, length: int) -> "list[Conversation]":
        """A plain text in pieces of `length` tokens. A last piece of one token is dropped: nothing of it is trained."""
        pieces = [self.tokens[start : start + length] for start in range(0, len(self.tokens), length)]
        return [Conversation(tokens, [1, len(tokens) - 1]) for tokens in pieces if len(tokens) > 1]

    @property
    def num_trained(self) -> int:
        return sum(self.mask_run_lengths[1::2])


def check_tokenizer_folder(folder: Path) -> None:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"tokenizer folder {folder} {what}: get the model with scripts/1_download.sh model ID")
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise UserError(
            f"tokenizer folder {folder} has no tokenizer.json or vocabulary file: give a Hugging Face model's folder"
        )


def load_tokenizer(folder: Path, template_needed: bool = True) -> Any:
    """The fast tokenizer of a local folder, without running code from it. It must have a chat template, if needed."""
    check_tokenizer_folder(folder)
    tokenizer = read_tokenizer(folder)
    if template_needed and not template_of(tokenizer):
        raise UserError(
            f"{no_template(tokenizer, folder)}: add a chat_template.jinja, as in the folder of the family's chat (instruct) "
            "model, or give that folder"
        )
    # As a tokenizer's own call does it: whole texts, and special tokens recognized in them.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.encode_special_tokens = False
    return tokenizer


def encode(tokenizer: Any, rendered: Sequence[RenderedText], words: WordEncoder | None = None) -> Iterator[Conversation]:
    """The conversations of these texts, in order; with `words` the same, sooner. Each is checked when it is taken: that its
    mask cannot be exact is a `UserError`, to which the caller adds file and line."""
    texts = [conversation.text for conversation in rendered]
    if words is not None:
        encodings = words.encode_batch(texts)
    else:
        encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return map(_conversation, encodings, rendered)


def check_against_template(template: ChatTemplate, example: Example, encoded: Conversation) -> None:
    """Refuse tokens that differ from those that transformers itself makes of the conversation or the text."""
    if example.messages:
        expected, by = (
            template.tokens_of(example.messages, example.tools, example.template_kwargs),
            "apply_chat_template(tokenize=True)",
        )
    else:
        expected, by = list(template.tokenizer(example.text.removeprefix(template.text_start)).input_ids), "()"
        if expected[-1:] != [template.tokenizer.eos_token_id]:
            expected.append(template.tokenizer.eos_token_id)
    if encoded.tokens.tolist() != expected:
        raise UserError(f"the tokens differ from those of tokenizer.{by}: check the tokenizer's files")


def _conversation(encoding: Any, rendered: RenderedText) -> Conversation:
    """The trained characters as runs of tokens. A token is trained if all of its characters are."""
    tokens = np.asarray(encoding.ids, dtype=np.int64)
    if rendered.everything:
        for answer in rendered.answers:
            _check_end(encoding, answer, answer.end)
        return Conversation(tokens, [1, len(tokens) - 1] if len(tokens) > 1 else [1])
    runs: list[int] = []
    position = num_merged = 0
    for (start, end), answer in zip(rendered.trained, rendered.answers, strict=True):
        first, is_merged = _first_token(encoding, rendered.text, start, end)
        after = _check_end(encoding, answer, end) + 1
        if first < position or first == 0:
            raise UserError("an answer shares a token with what precedes it: the mask cannot be exact, change the record")
        runs += [first - position, after - first]
        position = after
        num_merged += is_merged
    if position < len(tokens):
        runs.append(len(tokens) - position)
    return Conversation(tokens, runs, num_merged)


def _first_token(encoding: Any, text: str, start: int, end: int) -> tuple[int, bool]:
    """The first token within text[start:end], and whether the one before it also has the span's first white space."""
    # The offsets of some tokenizers skip white space.
    found = (encoding.char_to_token(character) for character in range(start, end))
    token = next((token for token in found if token is not None), None)
    if token is None:
        raise UserError("an answer has no token: change the record")
    token_start, token_end = encoding.token_to_chars(token)
    if token_start >= start:
        return token, False
    if text[start:token_end].strip():
        raise UserError("an answer shares its first token with the header: the mask cannot be exact, change the record")
    return token + 1, True


def _check_end(encoding: Any, answer: Answer, end: int) -> int:
    """The last token of a span that ends at `end`: the answer's end-of-turn token, or one after it where the template
    marks more."""
    token = encoding.char_to_token(answer.end - 1)
    last = token if end == answer.end else encoding.char_to_token(end - 1)
    if token is None or encoding.ids[token] != answer.end_of_turn_id or last is None or last < token:
        raise UserError("the end-of-turn token of an answer is not a separate token: check the tokenizer's added tokens")
    if encoding.token_to_chars(last)[1] > end:
        raise UserError("the last token of an answer holds a part of the next turn: the mask cannot be exact")
    return int(last)
