"""Cuts long conversations between their rounds: a question of the user, and all turns up to the next."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from megatron.sft.chat.conversations import Example
from megatron.sft.chat.encoding import Encoded


def rounds_of(example: Example) -> list[Example]:
    """Every round of the conversation, with its system text and functions."""
    messages, trained = example.messages, example.trained
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
    system = slice(0, starts[0])
    return [
        replace(example, messages=messages[system] + messages[start:end], trained=trained[system] + trained[start:end])
        for start, end in pairwise([*starts, len(messages)])
    ]


def joined_rounds(rounds: Sequence[Example]) -> Example:
    """Rounds that follow one another as one conversation."""
    first = rounds[0]
    messages, trained = list(first.messages), list(first.trained)
    for one in rounds[1:]:
        start = next(index for index, message in enumerate(one.messages) if message["role"] == "user")
        messages += one.messages[start:]
        trained += one.trained[start:]
    return replace(first, messages=messages, trained=tuple(trained))


def pieces_of_text(encoded: Encoded, length: int) -> list[Encoded]:
    """A plain text's tokens in pieces of `length`. A last piece of one token is left out: it would have nothing trained."""
    starts = range(0, len(encoded.tokens), length)
    pieces = [encoded.tokens[start : start + length] for start in starts]
    return [Encoded(tokens, [1, len(tokens) - 1]) for tokens in pieces if len(tokens) > 1]
