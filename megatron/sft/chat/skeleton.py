"""The proof of the mask: every character of a rendered conversation is the template's or a text of the data.

1. A conversation is split into its texts, which are the data's, and its pattern: roles, calls, <think> tags.

       user "Hi", assistant "Yo."   ->   user PLACEHOLDER, assistant PLACEHOLDER;  "Hi", "Yo."

2. The template renders the pattern once, with a mark for every text. Cut at the marks this is the pattern's skeleton:

       <user>MARK0<end><assistant>MARK1<end>   ->   literals "<user>", "<end><assistant>", "<end>"

   Where an answer begins is shown by the prompt that inference gives for it, here `<user>MARK0<end><assistant>`; it ends
   with the end-of-turn token, the first added token after its text.

3. The render of any conversation of the pattern must then be literal, text, literal, ..., to its last character:

       "<user>" "Hi" "<end><assistant>" "Yo." "<end>"   so the answer is "Yo.<end>", characters 24 to 32

A template that drops, changes or repeats a text fails in step 2 or 3. Step 2 is done once for a pattern, so a conversation
costs one render and one comparison, linear in its length. No shorter render need be a prefix of a longer one.

The functions of `tools` differ from record to record, so step 2 renders two lists of them without anything in common: what
both renders share are literals, and between these step 3 accepts any text.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron.sft.chat.turns import Message

PLACEHOLDER = "\0"  # stands for a text; fields.py refuses it in data
THINKING = re.compile(r"\A(\s*<think>\s*)(.*?)(\s*</think>\s*)(.*?)(\s*)\Z", re.DOTALL)


@dataclass(frozen=True)
class TurnPattern:
    """A message without its texts. These are, in order: one for each PLACEHOLDER of its `content`, name and arguments of
    each call, the ids of calls, and the `fields`."""

    role: str
    content: str
    calls_with_id: tuple[bool, ...] = ()  # for each call whether it has an id
    fields: tuple[str, ...] = ()  # of "tool_call_id" and "name", those that a tool message has

    @property
    def num_printed(self) -> int:
        """How many texts a template must print: all but ids and fields, which come last."""
        return self.content.count(PLACEHOLDER) + 2 * len(self.calls_with_id)


Pattern = tuple[TurnPattern, ...]


class Slot(NamedTuple):
    """Place of a text in the render: which text of which turn."""

    turn: int
    number: int


FUNCTIONS = Slot(-1, -1)  # place of the functions of `tools`


@dataclass(frozen=True)
class AnswerSlots:
    """An assistant turn within a skeleton."""

    first: int  # index of its first slot
    last: int
    opening: str  # what the template writes between its prompt and the answer's first text
    closing: str  # from the answer's last text to the end of the end-of-turn token
    end_of_turn_id: int


@dataclass(frozen=True)
class Answer:
    """Character positions of an answer in a render: [start, text_start) is what the template writes itself after its
    prompt, `end` is just after the end-of-turn token."""

    start: int
    text_start: int
    end: int
    end_of_turn_id: int


class TextNotFound(Exception):  # noqa: N818
    """A render differs from its skeleton; `turn` is the first whose texts are not where they must be."""

    def __init__(self, turn: int) -> None:
        super().__init__(turn)
        self.turn = turn


@dataclass(frozen=True)
class Skeleton:
    """What the template writes around the texts of a pattern: `literals[i]` stands before slot i, the last one at the end."""

    literals: tuple[str, ...]
    slots: tuple[Slot, ...]
    answers: tuple[AnswerSlots, ...]

    def find_answers(self, render: str, texts: Sequence[Sequence[str]]) -> tuple[Answer, ...]:
        """The answers in a render of texts [turn][number], of which every character is accounted for; or TextNotFound."""
        if not render.startswith(self.literals[0]):
            raise TextNotFound(self._turn(0))
        spans = self._spans(render, texts, 0, len(self.literals[0]))
        answers = []
        for slots in self.answers:
            text_start, end = spans[slots.first][0], spans[slots.last][1] + len(slots.closing)
            answers.append(Answer(text_start - len(slots.opening), text_start, end, slots.end_of_turn_id))
        return tuple(answers)

    def _spans(self, render: str, texts: Sequence[Sequence[str]], first: int, position: int) -> list[tuple[int, int]]:
        """[start, end) of the slots from `first` on, which begins at `position`."""
        spans: list[tuple[int, int]] = []
        for index in range(first, len(self.slots)):
            slot, literal = self.slots[index], self.literals[index + 1]
            if slot == FUNCTIONS:
                return spans + self._spans_from_functions(render, texts, index, position)
            for text in printed_forms(texts[slot.turn][slot.number]):
                end = position + len(text)
                if render.startswith(text, position) and render.startswith(literal, end):
                    break
            else:
                raise TextNotFound(slot.turn)
            spans.append((position, end))
            position = end + len(literal)
        if position != len(render):
            raise TextNotFound(self.slots[-1].turn)
        return spans

    def _spans_from_functions(
        self, render: str, texts: Sequence[Sequence[str]], index: int, position: int
    ) -> list[tuple[int, int]]:
        """The functions may contain the literal that follows them, so each place where it stands is tried as their end."""
        literal = self.literals[index + 1]
        end = render.find(literal, position)
        while end >= 0:
            try:
                return [(position, end), *self._spans(render, texts, index + 1, end + len(literal))]
            except TextNotFound:
                end = render.find(literal, end + 1)
        raise TextNotFound(self._turn(index))

    def _turn(self, index: int) -> int:
        return next(slot.turn for slot in self.slots[index:] if slot != FUNCTIONS)


def split_message(message: Message, exact: bool) -> tuple[TurnPattern, list[str]]:
    """Pattern and texts of a message.

    Unless `exact`, white space at the ends of its content belongs to its texts, and white space around <think> tags is
    taken for the usual one, so that many conversations share a pattern; a template that prints it otherwise needs `exact`.
    """
    content = message["content"]
    thinking = THINKING.match(content) if message["role"] == "assistant" else None
    pattern, texts = _split_thinking(thinking, exact) if thinking else _split_content(content, exact)
    calls = message.get("tool_calls", [])
    for call in calls:
        texts += [call["function"]["name"], arguments_text(call["function"]["arguments"])]
    fields = tuple(name for name in ("tool_call_id", "name") if name in message)
    texts += [call["id"] for call in calls if "id" in call] + [message[name] for name in fields]
    return TurnPattern(message["role"], pattern, tuple("id" in call for call in calls), fields), texts


def _split_content(content: str, exact: bool) -> tuple[str, list[str]]:
    text = content.strip() if exact else content
    before, _, after = content.partition(text) if text else (content, "", "")
    return before + PLACEHOLDER * bool(text) + after, [text] if text else []


def _split_thinking(match: re.Match[str], exact: bool) -> tuple[str, list[str]]:
    """The thought and the answer are separate texts, either of which may be missing."""
    opening, thought, closing, answer, end = match.groups()
    if not exact:
        opening, closing, end = ("<think>\n", "\n</think>\n\n", "") if thought else ("<think>\n\n</think>\n\n", "", "")
    pattern = opening + PLACEHOLDER * bool(thought) + closing + PLACEHOLDER * bool(answer) + end
    return pattern, [text for text in (thought, answer) if text]


def join_message(pattern: TurnPattern, texts: Sequence[str]) -> Message:
    """The message of this pattern with these texts; arguments become an object."""
    remaining = iter(texts)
    first, *others = pattern.content.split(PLACEHOLDER)
    message: Message = {
        "role": pattern.role,
        "content": first + "".join(next(remaining) + other for other in others),
    }
    calls: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": next(remaining), "arguments": json.loads(next(remaining))}}
        for _ in pattern.calls_with_id
    ]
    for call, has_id in zip(calls, pattern.calls_with_id, strict=True):
        if has_id:
            call["id"] = next(remaining)
    if calls:
        message["tool_calls"] = calls
    return message | {name: next(remaining) for name in pattern.fields}


def printed_forms(text: str) -> Iterator[str]:
    """The text as it is, then what templates make of it: trimmed, or escaped as JSON."""
    yield text
    stripped = text.strip()
    if stripped != text:
        yield stripped
        yield text.lstrip()
        yield text.rstrip()
        yield text.lstrip("\n")
        yield text.strip("\n")
    if not text.isalnum():
        escaped = json.dumps(text, ensure_ascii=False)[1:-1]
        if escaped != text:
            yield escaped
            yield json.dumps(text)[1:-1]


def arguments_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
