"""Preference pairs in a data set: that all records are pairs or none is, and that both sides of one answer the same tokens."""

from collections.abc import Sequence

import numpy as np

from megatron.sft.chat.conversations import Example, Pair
from megatron.sft.chat.encoding import Conversation, encode
from megatron.sft.chat.template import ChatTemplate
from megatron.sft.runtime.errors import UserError

CONVERSATION, PAIR = "conversation", "preference pair"  # what a record can be


def check_kind(kind: str, place: str, kinds: dict[str, str], overlong: str, train_on: str) -> None:
    """Add the first record of a kind, with its place, to those of all sources. A `UserError` if there is another kind, or if a
    setting has no meaning for pairs; it stops the run whatever becomes of bad records, as it is not one record's fault."""
    if kind in kinds:
        return
    for other, first in kinds.items():
        raise UserError(
            f"{place} is a {kind}, and {first} a {other}, but a data set has one kind of record: tokenise them apart, or make "
            'conversations of the pairs by dropping their other side, for example MAP_COLUMNS="chosen=messages rejected=-"'
        )
    if kind == PAIR and overlong == "split":
        raise UserError(f"OVERLONG=split, but {place} is a {PAIR}, whose answers cannot be split: set drop, truncate or error")
    if kind == PAIR and train_on == "all":
        raise UserError(
            f"TRAIN_ON=all, but {place} is a {PAIR}, of which only the answers count: set all_assistant or last_assistant"
        )
    kinds[kind] = place


def check_pair(pair: Pair, unit: Sequence[Conversation], template: ChatTemplate) -> None:
    """Refuse a pair of which both sides have the same tokens, or other tokens before their first answer."""
    chosen, rejected = (conversation.tokens for conversation in unit)
    if np.array_equal(chosen, rejected):
        raise UserError("the chosen and the rejected side become the same tokens, so neither is preferred: remove the record")
    lengths = [
        _prompt_tokens(example, pair.num_prompt, conversation, template)
        for example, conversation in zip((pair.chosen, pair.rejected), unit, strict=True)
    ]
    if not np.array_equal(chosen[: lengths[0]], rejected[: lengths[1]]):
        raise UserError(
            f"the prompt has other tokens before the chosen answer ({lengths[0]}) than before the rejected one ({lengths[1]}): "
            "the chat template or the tokenizer joins it with the answers; change the record, or give another CHAT_TEMPLATE"
        )


def _prompt_tokens(example: Example, num_prompt: int, encoded: Conversation, template: ChatTemplate) -> int:
    """The tokens before the first answer after the prompt, which is message `num_prompt`."""
    if not template.trained_messages(example.messages, example.loss_flags)[num_prompt]:
        flags = [index == num_prompt for index in range(len(example.messages))]
        rendered = template.render(example.messages, example.tools, flags, example.template_kwargs)
        encoded = next(encode(template.tokenizer, [rendered]))
    return encoded.mask_run_lengths[0]
