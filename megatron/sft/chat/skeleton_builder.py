"""Builds skeletons (see skeleton.py): renders marks for the texts of a pattern, and cuts the result at the marks."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from megatron.sft.chat.skeleton import (
    FUNCTIONS,
    PLACEHOLDER,
    AnswerSlots,
    Marks,
    Pattern,
    Skeleton,
    Slot,
    TurnPattern,
    marked_message,
)
from megatron.sft.chat.turns import Messages, Tools
from megatron.sft.runtime.errors import UserError

FIX = "give another template (CHAT_TEMPLATE=<name or file>) that prints every text in full, or change the data"
TOOL_MARK = "MARKTOOL"
_PARAMETERS = {"required": ["q"], "properties": {"q": {"type": "string", "description": "D"}}, "type": "object"}
MARKED_TOOLS: tuple[list[dict[str, Any]], ...] = (
    [{"type": "function", "function": {"name": f"A{TOOL_MARK}", "description": "A", "parameters": {"type": "object"}}}],
    [
        {"function": {"parameters": {"p": {}}, "description": "B", "name": f"B{TOOL_MARK}"}, "type": TOOL_MARK},
        {"function": {"parameters": _PARAMETERS, "description": "C", "name": "OTHER"}, "type": "other"},
    ],
)
EMPTY_THINK = re.compile(r"<think>\s*</think>")
OPENED_THINK = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
# After a call, where a template may write them instead of its usual end of turn (Llama 3.1, gpt-oss, GLM).
CALL_ENDS = ("<|eom_id|>", "<|call|>", "<|observation|>")
MAX_SKELETONS = 4096  # in memory, a few kB each
# With more answers than this, most of their prompts are rendered without the turns long before, for linear cost.
MAX_FULL_PROMPTS = 8


class _Place(NamedTuple):
    """Where a slot stands in a marked render: [start, end)."""

    slot: Slot
    start: int
    end: int
    repeated: bool = False  # the name or id of a call once more, such as before its result


@dataclass(frozen=True)
class _MarkedRender:
    """The render of a pattern with marks for its texts."""

    pattern: Pattern
    messages: Messages
    tools: Tools
    text: str
    places: list[_Place]
    named_by_id: tuple[tuple[Slot, Slot], ...]

    def literal(self, index: int) -> str:
        """What stands before place `index`, or after the last place."""
        start = self.places[index - 1].end if index else 0
        return self.text[start : self.places[index].start if index < len(self.places) else None]


@dataclass
class SkeletonBuilder:
    """Makes the skeletons of one template, and notes what a user should know about it.

    `render` gives the text of (messages, tools, whether to end with the prompt for an answer).
    """

    tokenizer: Any
    render: Callable[[Messages, Tools, bool], str]
    notes: set[str]
    end_of_turn_ids: set[int]
    control_tokens: set[str]
    _built: dict[tuple[Pattern, bool], Skeleton] = field(default_factory=dict)
    _prompt_ends: dict[tuple[Pattern, bool], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._added_tokens: dict[str, int] = self.tokenizer.get_added_vocab()
        self._special_tokens = [str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special]

    def skeleton(self, pattern: Pattern, has_tools: bool) -> Skeleton:
        """The skeleton of a pattern. A `UserError` if the template does not print a mark or the functions, does not begin an
        answer with its prompt, or does not end it with a token."""
        found = self._built.get((pattern, has_tools))
        if found is None:
            found = self._build(pattern, has_tools)
            self._note(found, pattern)
            if len(self._built) >= MAX_SKELETONS:
                self._built.clear()
            self._built[pattern, has_tools] = found
        return found

    def _build(self, pattern: Pattern, has_tools: bool) -> Skeleton:
        marked = self._marked_render(pattern, MARKED_TOOLS[0] if has_tools else None)
        if has_tools:
            index, place = _functions_place(marked, self._marked_render(pattern, MARKED_TOOLS[1]))
            marked.places.insert(index, place)
        literals = tuple(marked.literal(index) for index in range(len(marked.places) + 1))
        slots = tuple(place.slot for place in marked.places)
        answers = (self._answer(marked, index) for index, turn in enumerate(pattern) if turn.role == "assistant")
        return Skeleton(literals, slots, tuple(answers), marked.named_by_id)

    def _marked_render(self, pattern: Pattern, tools: Tools) -> _MarkedRender:
        marked = [marked_message(index, turn, len(pattern)) for index, turn in enumerate(pattern)]
        messages = [message for message, _ in marked]
        text = self.render(messages, tools, False)
        places, named_by_id = _find_marks(text, pattern, [marks for _, marks in marked])
        return _MarkedRender(pattern, messages, tools, text, places, named_by_id)

    def _answer(self, marked: _MarkedRender, turn: int) -> AnswerSlots:
        places = enumerate(marked.places)
        indices = [index for index, place in places if place.slot.turn == turn and not place.repeated]
        if not indices:
            raise UserError(f"turn {turn} ('assistant') has no text to learn: fill it, or remove the record")
        first, last = indices[0], indices[-1]
        start = self._answer_start(marked, turn, first)
        closing, token_id = self._end_of_turn(marked.literal(last + 1), marked.pattern[turn])
        opening = marked.text[start : marked.places[first].start]
        has_block = EMPTY_THINK.search(marked.literal(first)) is not None
        return AnswerSlots(first, last, opening, closing, token_id, has_block)

    def _answer_start(self, marked: _MarkedRender, turn: int, first: int) -> int:
        """Where the answer begins that the model has to write: at the end of the prompt that inference gives it. `first` is
        the place of its first text."""
        text, pattern = marked.text, marked.pattern
        earliest, text_start = marked.places[first - 1].end if first else 0, marked.places[first].start
        is_reply = turn > 0 and pattern[turn - 1].role in ("user", "tool")
        num_answers = sum(other.role == "assistant" for other in pattern)
        num_before = sum(other.role == "assistant" for other in pattern[:turn])
        if is_reply and num_answers > MAX_FULL_PROMPTS and 0 < num_before < num_answers - 1:
            prompt_end = self._prompt_end(marked, turn)
            if prompt_end and text.startswith(prompt_end, earliest) and earliest + len(prompt_end) <= text_start:
                return earliest + len(prompt_end)
        own_opening = (pattern[turn].content or "").partition(PLACEHOLDER)[0]
        start = text_start - len(own_opening) if text.endswith(own_opening, 0, text_start) else text_start
        prompt = self.render(marked.messages[:turn], marked.tools, True) if turn else ""
        if turn and text.startswith(prompt) and earliest <= len(prompt) <= text_start:
            return len(prompt)
        # The prompt has more than the header, such as an opened <think>, that whole conversations do not have there.
        opened = len(OPENED_THINK.sub("", prompt))
        if turn and earliest <= opened < len(prompt) and text.startswith(prompt[:opened]):
            start = opened
        if turn and prompt.startswith(text[:start]):
            self._note_prompt(prompt[start:])
            return start
        # The turns before may be printed otherwise at the end of a text.
        ending = self._prompt_end(marked, turn) if is_reply else ""
        header = OPENED_THINK.sub("", ending)
        if header and text.startswith(header, earliest) and earliest + len(header) <= text_start:
            if text.startswith(ending, earliest) and earliest + len(ending) <= text_start:
                return earliest + len(ending)
            self._note_prompt(ending[len(header) :])
            return earliest + len(header)
        # A conversation's first turn has no prompt, and the turn before may be printed otherwise while it is the last.
        if not is_reply and self._header is not None:
            found = text.rfind(self._header, earliest, start)
            if found >= 0:
                return found + len(self._header)
        raise UserError(
            f"the chat template's prompt for an answer is not what stands before turn {turn} ('assistant') in a whole "
            f"text: {FIX}"
        )

    def _note_prompt(self, end: str) -> None:
        self.notes.add(
            f"the chat template ends its prompt for a new answer with {end!r}, which is not in its text of whole "
            "conversations: the model will have to continue from something that it is not trained on"
        )

    @cached_property
    def _header(self) -> str | None:
        """What the prompt for an answer has after a question; None if that is not how the template makes it."""
        question = [{"role": "user", "content": "MARK"}]
        text, prompt = (self.render(question, None, is_prompt) for is_prompt in (False, True))
        return prompt.removeprefix(text) if prompt.startswith(text) else None

    def _prompt_end(self, marked: _MarkedRender, turn: int) -> str:
        """What the prompt for answer `turn` has after the text before it. It is rendered with the last question and the
        turns from the last call on alone: all that precedes every answer would be quadratic in the number of turns."""
        pattern = marked.pattern
        asked = max((index for index in range(turn) if pattern[index].role == "user"), default=0)
        called = max((index for index in range(asked, turn) if pattern[index].role == "assistant"), default=turn)
        kept = [0] if pattern[0].role == "system" else []
        kept += [index for index in (asked, *range(called, turn)) if index not in kept]
        key = (tuple(pattern[index] for index in kept), marked.tools is not None)
        if key not in self._prompt_ends:
            prompt = self.render([marked.messages[index] for index in kept], marked.tools, True)
            last = marked.messages[kept[-1]]
            marks = [last[name] for name in ("content", "tool_call_id", "name") if last.get(name)]
            end = max((prompt.rfind(mark) + len(mark) for mark in marks if mark in prompt), default=len(prompt))
            self._prompt_ends[key] = prompt[end:]
        return self._prompt_ends[key]

    def _end_of_turn(self, following: str, turn: TurnPattern) -> tuple[str, int]:
        """The literal after an answer up to the end of its end-of-turn token, and that token's id."""
        if turn.calls or not (turn.content or "").rstrip().endswith(PLACEHOLDER):
            found = [(following.find(token), token) for token in self._call_ends() if token in following]
            if not found:
                raise UserError(
                    f"the chat template writes {following[:60]!r} after a call, without an end-of-turn token, so the model "
                    f"would not learn to stop: {FIX}"
                )
            start, token = min(found)
        else:
            start = len(following) - len(following.lstrip())
            token = max((t for t in self._added_tokens if following.startswith(t, start)), key=len, default="")
            if not token:
                raise UserError(
                    f"the chat template writes {following[:20]!r} after an answer, which begins with no added token, so "
                    "the model would not learn to stop: end answers with a special token in the template (or add the "
                    "token to the tokenizer: tools/edit_tokenizer)"
                )
        return following[: start + len(token)], self._added_tokens[token]

    def _call_ends(self) -> list[str]:
        """The tokens that may end an answer that does not end with a text: the last is that of plain answers."""
        ends = [token for token in (*CALL_ENDS, self.tokenizer.eos_token) if token in self._added_tokens]
        plain = self.skeleton((TurnPattern("user", PLACEHOLDER), TurnPattern("assistant", PLACEHOLDER)), False)
        return [*ends, plain.answers[0].closing.lstrip()]

    def _note(self, skeleton: Skeleton, pattern: Pattern) -> None:
        """Note the template's tokens, and what users should know of its literals."""
        self.end_of_turn_ids.update(answer.end_of_turn_id for answer in skeleton.answers)
        written = "".join(skeleton.literals)
        self.control_tokens.update(token for token in self._special_tokens if token in written)
        for answer in skeleton.answers:
            if answer.opening.strip() and pattern[skeleton.slots[answer.first].turn].content == PLACEHOLDER:
                self.notes.add(
                    f"the chat template writes {answer.opening!r} itself before the text of some answers; it is trained, "
                    "as the model has to write it after its prompt"
                )
        bos = self.tokenizer.bos_token
        if bos and skeleton.literals[0].startswith(bos + bos):
            raise UserError(f"the chat template begins with {bos!r} twice: remove one")
        if bos and not skeleton.literals[0].startswith(bos) and adds_bos(self.tokenizer):
            self.notes.add(f"the chat template does not print {bos!r}, so no conversation begins with it")


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins every text with its bos token."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def _find_marks(render: str, pattern: Pattern, marks: Sequence[Marks]) -> tuple[list[_Place], tuple[tuple[Slot, Slot], ...]]:
    """The places of all marks in the order of the render, which must be that of the turns, and the names of calls that are
    printed as a part of their ids alone (Kimi)."""
    places: list[_Place] = []
    named_by_id = []
    previous_end = 0
    for turn, of_turn in enumerate(marks):
        own: list[_Place] = []
        for index, mark in enumerate(of_turn.texts):
            starts = list(_occurrences(render, mark))
            id = of_turn.names.get(index)
            if not starts and id is not None and of_turn.texts[id] in render:
                named_by_id.append((Slot(turn, index), Slot(turn, id)))
            elif not starts and index < of_turn.num_printed:
                raise not_printed(turn, pattern[turn], "once and in its place")
            if len(starts) > 1 and index < of_turn.num_printed and index not in of_turn.names:
                raise not_printed(turn, pattern[turn], "once and in its place")
            own += [_Place(Slot(turn, index), start, start + len(mark), start > starts[0]) for start in starts]
        first = [place for place in own if not place.repeated]
        if first and min(place.start for place in first) < previous_end:
            raise not_printed(turn, pattern[turn], "once and in its place")
        previous_end = max((place.end for place in first), default=previous_end)
        places += own
    return sorted(places, key=lambda place: place.start), tuple(named_by_id)


def _occurrences(text: str, mark: str) -> Iterator[int]:
    start = text.find(mark)
    while start >= 0:
        yield start
        start = text.find(mark, start + len(mark))


def _functions_place(marked: _MarkedRender, other: _MarkedRender) -> tuple[int, _Place]:
    """The part that differs between two renders with other functions, and its index among the places."""
    holding = [index for index in range(len(marked.places)) if TOOL_MARK in marked.literal(index)]
    if len(holding) != 1 or len(marked.places) != len(other.places):
        what = "does not print the functions of 'tools'" if not holding else "prints the functions of 'tools' twice"
        raise UserError(f"the chat template {what}: {FIX}")
    (index,) = holding
    literal, other_literal = marked.literal(index), other.literal(index)
    before = _num_common(literal, other_literal)
    after = _num_common(literal[before:][::-1], other_literal[before:][::-1])
    end = marked.places[index].start
    return index, _Place(FUNCTIONS, end - len(literal) + before, end - after)


def _num_common(one: str, other: str) -> int:
    """The length of the longest common start."""
    different = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))


def not_printed(turn: int, pattern: TurnPattern, how: str = "as it is in the data") -> UserError:
    hint = " (as templates do that remove <think> parts)" if "</think>" in (pattern.content or "") else ""
    return UserError(f"the chat template does not print turn {turn} ({pattern.role!r}) {how}{hint}: {FIX}")
