"""Shows which tokens of a row are trained: in colour on a terminal, in [[ ]] elsewhere."""

import os
import sys
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from megatron.sft.data.tokenized import Row

GREEN, GREY, RESET = "\x1b[32m", "\x1b[90m", "\x1b[0m"
SAMPLE_TOKENS = 600


def colour_wanted(stream: IO[str] = sys.stdout) -> bool:
    """FORCE_COLOR and NO_COLOR, as most programs have them; else whether `stream` is a terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


def legend(colour: bool) -> str:
    return (
        f"{GREEN}green{RESET} is trained, {GREY}grey{RESET} is not" if colour else "[[ ]] is trained, the rest is not"
    )


def masked_pieces(tokenizer: Any, tokens: np.ndarray, trained: np.ndarray) -> Iterator[tuple[str, bool]]:
    """The text of [n] tokens, special tokens included, in pieces that are trained (True) or not."""
    borders = np.flatnonzero(np.diff(trained.astype(np.int8))) + 1
    for piece, mask in zip(np.split(tokens, borders), np.split(trained, borders), strict=True):
        yield (
            tokenizer.decode(piece.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False),
            bool(mask[0]),
        )


def conversation_text(tokenizer: Any, tokens: np.ndarray, trained: np.ndarray, colour: bool) -> str:
    """The text of [n] tokens, special tokens included, with the trained ones marked."""
    pieces = []
    for text, is_trained in masked_pieces(tokenizer, tokens, trained):
        if colour:
            # On every line anew: pagers reset colours at line ends.
            start = GREEN if is_trained else GREY
            pieces.append("\n".join(f"{start}{line}{RESET}" if line else "" for line in text.split("\n")))
        else:
            pieces.append(f"[[{text}]]" if is_trained else text)
    return "".join(pieces)


def sample_text(tokenizer: Any, tokens: np.ndarray, trained: np.ndarray, colour: bool) -> str:
    """`conversation_text`, with the middle left out where it is long."""
    if len(tokens) <= SAMPLE_TOKENS:
        return conversation_text(tokenizer, tokens, trained, colour).rstrip("\n")
    half = SAMPLE_TOKENS // 2
    start = conversation_text(tokenizer, tokens[:half], trained[:half], colour)
    end = conversation_text(tokenizer, tokens[-half:], trained[-half:], colour).rstrip("\n")
    return f"{start}\n… {len(tokens) - 2 * half:,} tokens not shown …\n{end}"


def row_text(tokenizer: Any, row: Row, colour: bool) -> Iterator[str]:
    """A heading and a text for every conversation of the row."""
    start = 0
    for number, length in enumerate(row.conversation_lengths.tolist(), start=1):
        part = slice(start, start + length)
        number_of = f"{number} of {len(row.conversation_lengths)}"
        yield f"---- conversation {number_of}: {length} tokens, {int(row.trained[part].sum())} trained ----"
        yield conversation_text(tokenizer, row.tokens[part], row.trained[part], colour).rstrip("\n")
        start += length
