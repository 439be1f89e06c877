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
from itertools import count
from typing import Any, NamedTuple

from megatron.sft.chat.call_arguments import Shape, Text, arguments_text, marked_value, split_value
from megatron.sft.chat.turns import Message

PLACEHOLDER = "\0"  # stands for a text; fields.py refuses it in data
THINKING = re.compile(r"\A(\s*<think>\s*)(.*?)(\s*</think>\s*)(.*?)(\s*)\Z", re.DOTALL)


class CallPattern(NamedTuple):
    """A call without its texts. Its arguments are one text if `shape` is None: JSON that the template is given as text
    (`as_text`) or as an object."""

    has_id: bool
    as_text: bool = False
    shape: Shape | None = None


class TurnPattern(NamedTuple):
    """A message without its texts. These are, in order: one for each PLACEHOLDER of its `content`, the name and those of the
    arguments of each call, the ids of calls, and the `fields`."""

    role: str
    content: str | None  # None: the template wants calls without content so
    calls: tuple[CallPattern, ...] = ()
    fields: tuple[str, ...] = ()  # of "tool_call_id" and "name", those that a tool message has


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
    has_empty_think: bool  # an empty <think> block stands before its first text


@dataclass(frozen=True)
class Answer:
    """Character positions of an answer in a render: [start, text_start) is what the template writes itself after its
    prompt, `end` is just after the end-of-turn token."""

    start: int
    text_start: int
    end: int
    end_of_turn_id: int
    has_empty_think: bool = False


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
    named_by_id: tuple[tuple[Slot, Slot], ...] = ()  # names of calls that the template prints as a part of the ids

    def find_answers(self, render: str, texts: Sequence[Sequence[Text]]) -> tuple[Answer, ...]:
        """The answers in a render of texts [turn][number], of which every character is accounted for; or TextNotFound."""
        if not render.startswith(self.literals[0]):
            raise TextNotFound(self._turn(0))
        spans = self._spans(render, texts, 0, len(self.literals[0]))
        for name, id in self.named_by_id:
            if str(texts[name.turn][name.number]) not in texts[id.turn][id.number]:
                raise TextNotFound(name.turn)
        answers = []
        for slots in self.answers:
            text_start, end = spans[slots.first][0], spans[slots.last][1] + len(slots.closing)
            start = text_start - len(slots.opening)
            answers.append(Answer(start, text_start, end, slots.end_of_turn_id, slots.has_empty_think))
        return tuple(answers)

    def _spans(self, render: str, texts: Sequence[Sequence[Text]], first: int, position: int) -> list[tuple[int, int]]:
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
                raise TextNotFound(self._faulty_turn(render, texts, index, position))
            spans.append((position, end))
            position = end + len(literal)
        if position != len(render):
            raise TextNotFound(self.slots[-1].turn)
        return spans

    def _spans_from_functions(
        self, render: str, texts: Sequence[Sequence[Text]], index: int, position: int
    ) -> list[tuple[int, int]]:
        """The functions may contain the literal that follows them, so each place where it stands is tried as their end."""
        literal, turn = self.literals[index + 1], self._turn(index)
        end = render.find(literal, position)
        while end >= 0:
            try:
                return [(position, end), *self._spans(render, texts, index + 1, end + len(literal))]
            except TextNotFound as error:
                end, turn = render.find(literal, end + 1), max(turn, error.turn)
        raise TextNotFound(turn)

    def _faulty_turn(self, render: str, texts: Sequence[Sequence[Text]], index: int, position: int) -> int:
        """The turn of a slot whose text or the literal after it is not at its place: the next one where the text is there and
        the literal begins as it must."""
        slot, literal = self.slots[index], self.literals[index + 1]
        for text in printed_forms(texts[slot.turn][slot.number]):
            if render.startswith(text, position) and render.startswith(literal[:1], position + len(text)):
                return self._turn(index + 1) if index + 1 < len(self.slots) else slot.turn
        return slot.turn

    def _turn(self, index: int) -> int:
        return next((slot.turn for slot in self.slots[index:] if slot != FUNCTIONS), 0)


def split_message(message: Message, exact: bool, whole: bool = True) -> tuple[TurnPattern, list[Text]]:
    """Pattern and texts of a message. With `whole`, arguments that are an object are one text, their JSON.

    Unless `exact`, white space at the ends of its content belongs to its texts, and white space around <think> tags is
    taken for the usual one, so that many conversations share a pattern; a template that prints it otherwise needs `exact`.
    """
    content = message["content"]
    thinking = THINKING.match(content) if content and message["role"] == "assistant" else None
    found = _split_thinking(thinking, exact) if thinking else _split_content(content or "", exact)
    texts: list[Text] = [*found[1]]
    if len(message) == 2:  # role and content, as most have
        return TurnPattern(message["role"], None if content is None else found[0]), texts
    calls = []
    for call in message.get("tool_calls", ()):
        arguments = call["function"]["arguments"]
        more: list[Text] = [arguments_text(arguments)]
        as_text, shape = isinstance(arguments, str), None
        if not (whole or as_text):
            shape, more = split_value(arguments)
        calls.append(CallPattern("id" in call, as_text, shape))
        texts += [call["function"]["name"], *more]
    fields = tuple(name for name in ("tool_call_id", "name") if name in message)
    texts += [call["id"] for call in message.get("tool_calls", ()) if "id" in call]
    texts += [message[name] for name in fields]
    return TurnPattern(message["role"], None if content is None else found[0], tuple(calls), fields), texts


def _split_content(content: str, exact: bool) -> tuple[str, list[str]]:
    if not exact:
        return (PLACEHOLDER, [content]) if content else ("", [])
    text = content.strip()
    before, _, after = content.partition(text) if text else (content, "", "")
    return before + PLACEHOLDER * bool(text) + after, [text] if text else []


def _split_thinking(match: re.Match[str], exact: bool) -> tuple[str, list[str]]:
    """The thought and the answer are separate texts, either of which may be missing."""
    opening, thought, closing, answer, end = match.groups()
    if not exact:
        opening, closing, end = ("<think>\n", "\n</think>\n\n", "") if thought else ("<think>\n\n</think>\n\n", "", "")
    pattern = opening + PLACEHOLDER * bool(thought) + closing + PLACEHOLDER * bool(answer) + end
    return pattern, [text for text in (thought, answer) if text]


class Marks(NamedTuple):
    """The marks of a message in the order of its texts. The first `num_content` are in its content; of the `names` (indices)
    each has the index of the mark of its call's id, if it has one; the marks from `num_printed` on need not be printed."""

    texts: list[str]
    num_content: int
    names: dict[int, int | None]
    num_printed: int


def marked_message(turn: int, pattern: TurnPattern, num_turns: int) -> tuple[Message, Marks]:
    """A message of this pattern with marks for its texts; none is part of another, or of a template. Each is of the form that
    a template may require: a name, a JSON object, an id of 9 characters (Mistral)."""
    first, *others = (pattern.content or "").split(PLACEHOLDER)
    marks = [f"MARK{turn}X{index}OF{num_turns}TEXT" for index in range(len(others))]
    content = first + "".join(mark + other for mark, other in zip(marks, others, strict=True))
    message: Message = {"role": pattern.role, "content": None if pattern.content is None else content}
    calls: list[dict[str, Any]] = []
    name_indices = []
    for index, call in enumerate(pattern.calls):
        prefix = f"MARK{turn}C{index}"
        if call.shape is None:
            arguments: Any = {f"{prefix}KEY": "value"}
            more = [arguments_text(arguments)]
        else:
            arguments, more = marked_value(call.shape, prefix, count(int(f"9{turn:04d}{index:03d}00000")))
        name_indices.append(len(marks))
        marks += [f"{prefix}NAME", *more]
        function = {"name": f"{prefix}NAME", "arguments": arguments_text(arguments) if call.as_text else arguments}
        calls.append({"type": "function", "function": function})
    names: dict[int, int | None] = dict.fromkeys(name_indices)
    num_printed = len(marks)
    for index, call in enumerate(pattern.calls):
        if call.has_id:
            names[name_indices[index]] = len(marks)
            calls[index]["id"] = f"i{turn:04d}x{index:03d}"
            marks.append(calls[index]["id"])
    if calls:
        message["tool_calls"] = calls
    for name in pattern.fields:
        message[name] = f"i{turn:04d}{name[0]}000"
        marks.append(message[name])
    return message, Marks(marks, len(others), names, num_printed)


def printed_forms(text: Text) -> Iterator[str]:
    """The text as it is, then what templates make of it: trimmed, or escaped as JSON."""
    if isinstance(text, tuple):
        yield from text
        return
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
