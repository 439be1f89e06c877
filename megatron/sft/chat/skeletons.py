"""The template's own words for conversations of one shape, and where a conversation's texts stand between them.

A conversation is cut into texts (what the data says) and a shape (roles, calls, reasoning, white space). The template is
rendered once for a shape with marks in place of the texts, which shows its own words around every text. The render of any
conversation of that shape must then be exactly those words and its own texts, from the first character to the last.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.sft.chat.turns import Message, Messages

THINKING = re.compile(r"\A(\s*<think>\s*)(.*?)(\s*</think>\s*)(.*?)(\s*)\Z", re.DOTALL)
HOLE = "\0"  # stands for a text in a content's pattern; no text of the data has it
LOOSE_THINKING = ("<think>\n", "\n</think>\n\n")
TOOL_MARK = "MARKTOOL"
# Two lists of functions without anything in common but that each is an object: what the template writes around them.
TOOLS_MARKED: tuple[list[dict[str, Any]], ...] = (
    [{"type": "function", "function": {"name": TOOL_MARK, "description": "A", "parameters": {"type": "object"}}}],
    [
        {"function": {"parameters": {"p": {}}, "description": "B", "name": TOOL_MARK}, "type": TOOL_MARK},
        {"function": {"parameters": {"q": {}}, "description": "C", "name": "OTHER"}, "type": "other"},
    ],
)


@dataclass(frozen=True)
class TurnShape:
    """All of a turn but its texts. `pattern` is its content with HOLEs; None stands for no content beside calls."""

    role: str
    pattern: str
    call_ids: tuple[bool, ...] = ()  # of every call, whether it has an id
    fields: tuple[str, ...] = ()  # other fields that a template may print


Shape = tuple[TurnShape, ...]


@dataclass(frozen=True)
class CallStyle:
    """How the template wants calls: arguments as text or as an object, and what stands for no content."""

    arguments_as_text: bool
    no_content: str | None


@dataclass(frozen=True)
class Words:
    """What the template writes before a text: `text`; or `text`, the row's functions, and `ending`."""

    text: str
    ending: str | None = None


@dataclass(frozen=True)
class Slot:
    """The words before one text, and which text of which turn that is."""

    turn: int
    which: int
    words: Words


@dataclass(frozen=True)
class AnswerSlots:
    """An assistant turn: its first and last slot, what the template writes itself between its prompt and the first text,
    and the words from its last text to the end of its end-of-turn token."""

    first: int
    last: int
    inserted: str
    closing: str
    end_of_turn_id: int


@dataclass(frozen=True)
class Skeleton:
    slots: tuple[Slot, ...]
    answers: tuple[AnswerSlots, ...]
    ending: str


def dissect(message: Message, exact: bool) -> tuple[TurnShape, list[str]]:
    """The shape and the texts of a message. Unless `exact`, white space at the ends of its content is a part of its texts
    and that beside <think> tags the usual one, so that many conversations share one shape."""
    content = message["content"] or ""
    texts: list[str] = []
    thinking = THINKING.match(content) if message["role"] == "assistant" else None
    if thinking:
        opening, thought, closing, answer, end = thinking.groups()
        if not thought and not exact:
            opening, closing = "<think>\n\n</think>\n\n", ""
        elif not exact:
            opening, closing = LOOSE_THINKING
        texts = [text for text in (thought, answer) if text]
        pattern = opening + HOLE * bool(thought) + closing + HOLE * bool(answer) + (end if exact else "")
    elif exact:
        core = content.strip()
        texts = [core] if core else []
        start = len(content) - len(content.lstrip())
        pattern = content[:start] + HOLE + content[start + len(core) :] if core else content
    else:
        texts = [content] if content else []
        pattern = HOLE if content else ""
    calls = message.get("tool_calls", [])
    fields = tuple(name for name in ("tool_call_id", "name") if name in message)
    for call in calls:
        texts += [call["function"]["name"], _as_text(call["function"]["arguments"])]
    shape = TurnShape(message["role"], pattern, tuple("id" in call for call in calls), fields)
    texts += [call["id"] for call in calls if "id" in call] + [message[name] for name in fields]
    return shape, texts


def marked(shape: Shape, style: CallStyle | None) -> tuple[Messages, list[list[str]]]:
    """A conversation of this shape with marks in place of all texts, and those marks for every turn."""
    messages: Messages = []
    marks: list[list[str]] = []
    for index, turn in enumerate(shape):
        own = [f"MARK{index}X{hole}OF{len(shape)}TEXT" for hole in range(turn.pattern.count(HOLE))]
        pieces = turn.pattern.split(HOLE)
        content = pieces[0] + "".join(mark + piece for mark, piece in zip(own, pieces[1:], strict=True))
        message: Message = {"role": turn.role, "content": content}
        calls = []
        for place, has_id in enumerate(turn.call_ids):
            name, key = f"MARK{index}C{place}NAME", f"MARK{index}C{place}KEY"
            call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": {key: "value"}}}
            calls.append(call | ({"id": f"i{index:04d}x{place:03d}"} if has_id else {}))
            own += [name, _as_text({key: "value"})]
        if calls:
            message["tool_calls"] = calls
        own += [call["id"] for call in calls if "id" in call]
        for name in turn.fields:
            message[name] = f"i{index:04d}{name[0]}000"  # 9 characters, which some templates ask of an id
            own.append(message[name])
        messages.append(message)
        marks.append(own)
    return [in_style(message, style) for message in messages], marks


def in_style(message: Message, style: CallStyle | None) -> Message:
    """The message as the template wants it."""
    calls = message.get("tool_calls")
    if style is None or not calls:
        return message
    changed = []
    for call in calls:
        function = call["function"]
        arguments = function["arguments"]
        if style.arguments_as_text:
            arguments = _as_text(arguments)
        elif isinstance(arguments, str):
            arguments = json.loads(arguments)
        changed.append(call | {"function": function | {"arguments": arguments}})
    return message | {"tool_calls": changed, "content": message["content"] or style.no_content}


def is_optional(shape: TurnShape, text: int) -> bool:
    """Whether a template may leave out this text of a turn: ids of calls, names of results."""
    return text >= shape.pattern.count(HOLE) + 2 * len(shape.call_ids)


def placed(skeleton: Skeleton, text: str, texts: Sequence[Sequence[str]]) -> list[tuple[int, int]] | int:
    """Where each slot's text stands, [start, end), all of `text` being accounted for; else the first turn that is not
    where it must be."""
    spans: list[tuple[int, int]] = []
    failed = _place(skeleton, text, texts, 0, spans)
    return spans if failed is None else failed


def _place(
    skeleton: Skeleton, text: str, texts: Sequence[Sequence[str]], position: int, spans: list[tuple[int, int]]
) -> int | None:
    """Place all slots from `len(spans)` on, of which the first's text begins at `position` if any is placed, else its
    words do. Gives the turn that fails."""
    slots = skeleton.slots
    after_words = bool(spans) or position > 0
    for number in range(len(spans), len(slots)):
        slot = slots[number]
        if not after_words:
            if not text.startswith(slot.words.text, position):
                return slot.turn
            position += len(slot.words.text)
            if slot.words.ending is not None:
                return _place_after_functions(skeleton, text, texts, position, spans)
        after_words = False
        following = slots[number + 1].words.text if number + 1 < len(slots) else skeleton.ending
        for variant in variants(texts[slot.turn][slot.which]):
            end = position + len(variant)
            if text.startswith(variant, position) and text.startswith(following, end):
                break
        else:
            return slot.turn
        spans.append((position, end))
        position = end
    return None if position + len(skeleton.ending) == len(text) else slots[-1].turn


def _place_after_functions(
    skeleton: Skeleton, text: str, texts: Sequence[Sequence[str]], position: int, spans: list[tuple[int, int]]
) -> int | None:
    """The functions end where the words after them stand and all the rest has its place; their own texts may hold those
    words, too, so every place is tried."""
    number = len(spans)
    slot = skeleton.slots[number]
    assert slot.words.ending is not None
    while (found := text.find(slot.words.ending, position)) >= 0:
        del spans[number:]
        if _place(skeleton, text, texts, found + len(slot.words.ending), spans) is None:
            return None
        position = found + 1
    return slot.turn


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def variants(content: str) -> Iterator[str]:
    """The text itself, then what templates make of it: white space trimmed at its ends, or written as JSON."""
    yield content
    stripped = content.strip()
    if stripped != content:
        yield stripped
        yield content.lstrip()
        yield content.rstrip()
        yield content.lstrip("\n")
        yield content.strip("\n")
    if not content.isalnum():
        escaped = json.dumps(content, ensure_ascii=False)[1:-1]
        if escaped != content:
            yield escaped
            yield json.dumps(content)[1:-1]
