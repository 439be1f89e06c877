"""Encodes ASCII text word by word from memory: the ids of the tokenizers library, in less time (docs/performance.md).

Byte-level BPE cuts text at added tokens and by a regular expression, then merges bytes within each of these words, so a
word has the same ids wherever it stands, and the tokenizer's model needs to encode it only once. The cutting is done here,
for the few ways of cutting that are known, and only of ASCII text, where all regular expression engines agree about
letters and spaces. Before it is used, it must agree with the library on thousands of short texts with every kind of
neighbors. All other text goes to the library.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_WORDS = 200_000  # in memory; about 40 MB
MAX_WORD_LENGTH = 100  # longer ones are not kept
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CLASSES = {"L": "A-Za-z", "N": "0-9"}


@dataclass(frozen=True)
class Encoding:
    """Tokens of a text with the characters that each covers, with the methods of the library's own Encoding."""

    ids: np.ndarray  # [n] int64
    starts: np.ndarray  # [n] int64
    ends: np.ndarray  # [n] int64

    def char_to_token(self, character: int) -> int | None:
        token = int(self.ends.searchsorted(character, "right"))  # the method costs half of what the function does
        return token if token < len(self.ids) and self.starts[token] <= character else None

    def token_to_chars(self, token: int) -> tuple[int, int]:
        return int(self.starts[token]), int(self.ends[token])


class WordIds(dict[str, tuple[int, ...]]):
    """The ids of words; the model encodes those that are new."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model
        self._byte_level = dict(enumerate(byte_level_alphabet()[:128]))

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(token.id for token in self._model.tokenize(word.translate(self._byte_level)))
        if len(self) >= MAX_WORDS:
            self.clear()
        if len(word) <= MAX_WORD_LENGTH:
            self[word] = ids
        return ids


class WordEncoder:
    """`encode_batch` of one tokenizer. Make it with `word_encoder`, which checks whether it may be used.

    `cut` gives the words of ASCII text without added tokens.
    """

    def __init__(self, backend: Any, added_tokens: dict[str, int], cut: Callable[[str], list[str]]) -> None:
        self._backend = backend
        self._added_tokens = added_tokens
        longest_first = sorted(added_tokens, key=len, reverse=True)
        # Without added tokens: a pattern that is nowhere.
        self._added_token = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        self._cut = cut
        self._word_ids = WordIds(backend.model).__getitem__
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)  # in characters, where these are ASCII
        self._lengths[list(vocabulary.values())] = [len(token) for token in vocabulary]

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        """What the library's encode_batch gives without special tokens: for each text an object with the methods of
        `Encoding`."""
        pieces = [self._added_token.split(text) for text in texts]
        others = list({piece: None for of_text in pieces for piece in of_text[::2] if not piece.isascii()})
        encodings = dict(zip(others, self._backend.encode_batch(others, add_special_tokens=False), strict=True))
        return [self._encoding(text, of_text, encodings) for text, of_text in zip(texts, pieces, strict=True)]

    def _encoding(self, text: str, pieces: list[str], encodings: dict[str, Any]) -> Any:
        """Of a text in pieces, every second of which is an added token; `encodings` has those that the library encoded."""
        ids: list[int] = []
        by_library: list[tuple[slice, int, str]] = []  # tokens, first character, piece
        position = 0
        for index, piece in enumerate(pieces):
            if index % 2:
                ids.append(self._added_tokens[piece])
            elif piece in encodings:
                by_library.append((slice(len(ids), len(ids) + len(encodings[piece].ids)), position, piece))
                ids += encodings[piece].ids
            elif piece:
                ids += itertools.chain.from_iterable(map(self._word_ids, self._cut(piece)))
            position += len(piece)
        id_array = np.array(ids, dtype=np.int64)
        lengths = self._lengths[id_array]
        for tokens, _, piece in by_library:
            lengths[tokens] = 0
            lengths[tokens.stop - 1] = len(piece)
        ends = np.cumsum(lengths)
        if not len(ends) or ends[-1] != len(text):  # the cutting skipped something
            return self._backend.encode(text, add_special_tokens=False)
        starts = ends - lengths
        for tokens, position, piece in by_library:
            offsets = np.array(encodings[piece].offsets, dtype=np.int64) + position
            starts[tokens], ends[tokens] = offsets[:, 0], offsets[:, 1]
        return Encoding(id_array, starts, ends)


@functools.lru_cache(maxsize=4)
def word_encoder(tokenizer: Any) -> WordEncoder | None:
    """The encoder for a fast tokenizer of transformers; None if its way of cutting is unknown, or gives other ids."""
    backend = tokenizer.backend_tokenizer
    description = json.loads(backend.to_str())
    added = description["added_tokens"]
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    pattern = cutting_pattern(description)
    if pattern is None or any(token[flag] for token in added for flag in flags):
        return None
    ids = {token["content"]: token["id"] for token in added}
    encoder = WordEncoder(backend, ids, re.compile(pattern, re.ASCII).findall)
    texts = trial_texts(list(ids))
    expected = backend.encode_batch(texts, add_special_tokens=False)
    agree = all(a.ids == list(b.ids) for a, b in zip(expected, encoder.encode_batch(texts), strict=True))
    return encoder if agree else None


def cutting_pattern(description: dict[str, Any]) -> str | None:
    """The regular expression whose matches are the words of ASCII text, of a tokenizer.json that is byte-level BPE."""
    model, normalizer = description["model"], description["normalizer"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("byte_fallback"):
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    if normalizer not in (None, {"type": "NFC"}):  # which leaves ASCII text as it is
        return None
    steps = description["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    *before, last = steps
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"] and not before:
        return ascii_pattern(GPT2_PATTERN)
    if last["use_regex"] and before == [{"type": "Digits", "individual_digits": True}]:
        # Digits are cut out first, so white space before one is at the end of its part.
        return ascii_pattern(GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])"))
    if not last["use_regex"] and len(before) == 1 and before[0].get("type") == "Split":
        split = before[0]
        if split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]:
            return ascii_pattern(split["pattern"]["Regex"])
    return None


def ascii_pattern(pattern: str) -> str | None:
    """The pattern with letters and digits written out; None where it has other classes or groups."""
    translated, in_brackets = "", False
    for part in re.findall(r"\\p\{\w+\}|\\.|\(\?[i:=!]+|.", pattern, re.DOTALL):
        if part.startswith("\\p{"):
            characters = CLASSES.get(part[3:-1])
            if characters is None:
                return None
            translated += characters if in_brackets else f"[{characters}]"
            continue
        if part == "[":
            in_brackets = True
        elif part == "]":
            in_brackets = False
        elif (part == "(" and not in_brackets) or (part.startswith("\\") and part[1] not in "rntsS.\\-[]/"):
            return None
        translated += part
    return translated


def trial_texts(added_tokens: list[str]) -> list[str]:
    """Short texts with every kind of neighbors that cutting may depend on, each ASCII character among them."""
    texts = ["".join(chosen) for n in (1, 2, 3) for chosen in itertools.product("aS'19 \n\r\t._<", repeat=n)]
    texts += ["".join(chosen) for chosen in itertools.product("as'1 \n\r.", repeat=4)]
    texts += ["".join(chosen) for chosen in itertools.product("a1 \n.", repeat=5)]
    around = [" {}", "{} ", "a{}", "{}a", "1{}", "{}1", ".{}", "{}.", "\n{}", "{}\n", " {}a", "a{} ", "'{}", "a'{}e", "{0}{0}"]
    texts += [form.format(character) for form in around for character in map(chr, range(128))]
    for token in added_tokens[:50]:
        texts += [f"a{token}b", f" {token} \n", f"{token}{token}", f"1 {token}1\n\n{token}"]
    return texts


def byte_level_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies: as GPT-2's encoder chose them, the printable
    ones for themselves, the others in turn from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
