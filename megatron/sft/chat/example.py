"""One record after reading: the messages of a conversation, or a plain text."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from megatron.sft.chat.calls import Tools
from megatron.sft.chat.turns import Messages

OPENING_ROLES = ("system", "user")


@dataclass(frozen=True)
class Example:
    """One record: either `messages` or `text` (to be learned as it is) is filled.

    `loss_flags` has for every message what its own `loss` field says, None where it has none. `template_kwargs` are the
    record's own arguments for the chat template (its `chat_template_kwargs`).
    """

    messages: Messages
    loss_flags: tuple[bool | None, ...] = ()
    tools: Tools = None
    text: str = ""
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def rounds(self) -> "list[Example]":
        """An example for every question with the turns up to the next, each with the system text and the functions. Several
        user turns in a row are one question."""
        roles = [message["role"] for message in self.messages]
        first = _num_system(self)
        starts = [first]
        for index in range(first + 1, len(roles)):
            before = roles[starts[-1] : index]
            is_answered = "assistant" in before and any(role in OPENING_ROLES for role in before)
            if is_answered and roles[index] in OPENING_ROLES and roles[index - 1] not in OPENING_ROLES:
                starts.append(index)
        if "assistant" not in roles[starts[-1] :]:  # turns after the last answer belong to its round
            starts.pop()
        spans = [[*range(first), *range(start, end)] for start, end in pairwise([*starts, len(roles)])]
        return [
            replace(
                self,
                messages=[self.messages[index] for index in span],
                loss_flags=tuple(self.loss_flags[index] for index in span),
            )
            for span in spans
        ]


def join_rounds(rounds: Sequence[Example]) -> Example:
    """Consecutive rounds of one example, with its system text once."""
    num_system = _num_system(rounds[0])
    messages, flags = rounds[0].messages[:num_system], rounds[0].loss_flags[:num_system]
    for example in rounds:
        messages = messages + example.messages[num_system:]
        flags += example.loss_flags[num_system:]
    return replace(rounds[0], messages=messages, loss_flags=flags)


def _num_system(example: Example) -> int:
    """The system turns at the beginning."""
    return next(index for index, message in enumerate(example.messages) if message["role"] != "system")
