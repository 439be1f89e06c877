"""Makes skeletons (see skeletons.py) of a chat template: renders marks in place of texts, and cuts the result at them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron.sft.chat.skeletons import (
    HOLE,
    TOOL_MARK,
    TOOLS_MARKED,
    AnswerSlots,
    CallStyle,
    Shape,
    Skeleton,
    Slot,
    TurnShape,
    Words,
    is_optional,
    marked,
)
from megatron.sft.chat.turns import Messages
from megatron.sft.runtime.errors import UserError

FIX = "give another template (CHAT_TEMPLATE=<name or file>) that prints every text in full, or change the data"
OTHER_ENDS = ("<|eom_id|>", "<|call|>")  # after a call, where it is not the end of other answers
MAX_SKELETONS = 4096
MANY_ANSWERS = 8  # with more, prompts are compared on a part of the conversation
Tools = list[dict[str, Any]] | None


@dataclass
class SkeletonMaker:
    """The skeletons of one template. `render` gives the text of (messages, tools, whether with the prompt for an answer);
    `made` is told of every new skeleton."""

    tokenizer: Any
    render: Callable[[Messages, Tools, bool], str]
    call_style: Callable[[], CallStyle]
    notes: set[str]
    made: Callable[[Skeleton, Shape], None]
    _known: dict[tuple[Shape, bool], Skeleton] = field(default_factory=dict)
    _tails: dict[tuple[Shape, bool], str] = field(default_factory=dict)
    _other_ends: list[str] | None = None

    def __post_init__(self) -> None:
        self._added_tokens: dict[str, int] = self.tokenizer.get_added_vocab()

    def of(self, shape: Shape, has_tools: bool) -> Skeleton:
        """Render marks in place of the texts, and cut the result at them."""
        if (known := self._known.get((shape, has_tools))) is not None:
            return known
        has_calls = any(turn.call_ids for turn in shape)
        messages, marks = marked(shape, self.call_style() if has_calls else None)
        text = self.render(messages, TOOLS_MARKED[0] if has_tools else None, False)
        places = mark_places(text, shape, marks)
        words, ending = words_between(text, places)
        if has_tools:
            other = self.render(messages, TOOLS_MARKED[1], False)
            words = around_tools(words, words_between(other, mark_places(other, shape, marks))[0])
        slots = tuple(Slot(turn, which, own) for (turn, which, _, _), own in zip(places, words, strict=True))
        answers = []
        for turn in (index for index, one in enumerate(shape) if one.role == "assistant"):
            numbers = [number for number, slot in enumerate(slots) if slot.turn == turn]
            if not numbers:
                raise UserError(f"turn {turn} ('assistant') has no text to learn: fill it, or remove the row")
            first, last = numbers[0], numbers[-1]
            previous_end = places[first - 1][3] if first else 0
            start = self._answer_start(messages, turn, shape, text, previous_end, places[first][2], has_tools)
            following = slots[last + 1].words.text if last + 1 < len(slots) else ending
            closing, token_id = self._end_of_turn(following, shape[turn])
            answers.append(AnswerSlots(first, last, text[start : places[first][2]], closing, token_id))
        skeleton = Skeleton(slots, tuple(answers), ending)
        self.made(skeleton, shape)
        if len(self._known) >= MAX_SKELETONS:
            self._known.clear()
        self._known[shape, has_tools] = skeleton
        return skeleton

    def _answer_start(
        self, messages: Messages, turn: int, shape: Shape, text: str, previous_end: int, start: int, has_tools: bool
    ) -> int:
        """Where the answer begins that the model has to write: at the end of the prompt that inference gives it. `text` is
        the render of `messages`, the turn before ends at `previous_end`, the answer's first text begins at `start`."""
        tools = TOOLS_MARKED[0] if has_tools else None
        num_answers = sum(one.role == "assistant" for one in shape)
        num_before = sum(one.role == "assistant" for one in shape[:turn])
        if num_answers > MANY_ANSWERS and 0 < num_before < num_answers - 1:
            tail = self._tail(messages, turn, shape, tools)
            if tail and text.startswith(tail, previous_end) and previous_end + len(tail) <= start:
                return previous_end + len(tail)
        prompt = self.render(messages[:turn], tools, True)
        if text.startswith(prompt) and previous_end <= len(prompt) <= start:
            return len(prompt)
        # The answer may begin with words of its own before its first text, as `<think>` is.
        opening = shape[turn].pattern.partition(HOLE)[0]
        own_start = start - len(opening) if text.endswith(opening, 0, start) else start
        if prompt.startswith(text[:own_start]):
            self.notes.add(
                f"the chat template ends its prompt for a new answer with {prompt[own_start:]!r}, which is not in its text "
                "of whole conversations: the model will be asked to go on from something that it is not trained on"
            )
            return own_start
        raise UserError(
            f"the chat template's prompt for an answer is not what stands before that answer in a whole text: {FIX}"
        )

    def _tail(self, messages: Messages, turn: int, shape: Shape, tools: Tools) -> str:
        """What the prompt for answer `turn` has after the text before it, from the last question and the last call alone:
        rendering all that precedes every answer would be quadratic in the number of turns."""
        asked = max(index for index in range(turn) if shape[index].role == "user")
        called = max((index for index in range(asked, turn) if shape[index].role == "assistant"), default=turn)
        kept = [0] if shape[0].role == "system" else []
        kept += [asked, *range(called, turn)]
        key = (tuple(shape[index] for index in kept), tools is not None)
        if key not in self._tails:
            part = [messages[index] for index in kept]
            prompt = self.render(part, tools, True)
            last = part[-1]
            mark = max((last[name] for name in ("content", "tool_call_id", "name") if last.get(name)), key=prompt.rfind)
            end = prompt.rfind(mark)
            self._tails[key] = prompt[end + len(mark) :] if end >= 0 else ""
        return self._tails[key]

    def _end_of_turn(self, following: str, shape: TurnShape) -> tuple[str, int]:
        """The text from the end of an answer's texts to the end of its end-of-turn token, and that token's id."""
        stripped = following.lstrip()
        if not shape.call_ids and shape.pattern.rstrip().endswith(HOLE):
            tokens = [token for token in self._added_tokens if stripped.startswith(token)]
            if not tokens:
                raise UserError(
                    f"the chat template writes {following[:20]!r} after an answer, which begins with no added token, so "
                    "the model would not learn to stop: end answers with a special token in the template (or add the "
                    "token to the tokenizer: tools/edit_tokenizer)"
                )
            token = max(tokens, key=len)
            return following[: len(following) - len(stripped)] + token, self._added_tokens[token]
        found = [(following.find(token), token) for token in self._ends() if token in following]
        if not found:
            raise UserError(
                f"the chat template writes {following[:60]!r} after a call, without an end-of-turn token, so the model would "
                f"not learn to stop: {FIX}"
            )
        place, token = min(found)
        return following[: place + len(token)], self._added_tokens[token]

    def _ends(self) -> list[str]:
        """The tokens that may end an answer that does not end with a text."""
        if self._other_ends is None:
            self._other_ends = [token for token in OTHER_ENDS if token in self._added_tokens]
            self._other_ends += [self.tokenizer.eos_token] if self.tokenizer.eos_token in self._added_tokens else []
            plain = self.of((TurnShape("user", HOLE), TurnShape("assistant", HOLE)), False)
            self._other_ends.append(plain.answers[0].closing.lstrip())
        return self._other_ends


def mark_places(text: str, shape: Shape, marks: list[list[str]]) -> list[tuple[int, int, int, int]]:
    """(turn, which of its texts, start, end) of all marks in `text`, which must stand in the order of the turns."""
    places: list[tuple[int, int, int, int]] = []
    for turn, own in enumerate(marks):
        found = []
        for which, mark in enumerate(own):
            count = text.count(mark)
            if count == 0 and is_optional(shape[turn], which):
                continue
            if count != 1:
                raise unproven(turn, shape[turn], "once and in its place")
            start = text.index(mark)
            found.append((turn, which, start, start + len(mark)))
        found.sort(key=lambda place: place[2])
        if found and places and found[0][2] < places[-1][3]:
            raise unproven(turn, shape[turn], "once and in its place")
        places += found
    return places


def words_between(text: str, places: list[tuple[int, int, int, int]]) -> tuple[list[Words], str]:
    """What stands before each mark, and after the last."""
    ends = [0, *(end for _, _, _, end in places)]
    return [Words(text[end:start]) for end, (_, _, start, _) in zip(ends, places, strict=False)], text[ends[-1] :]


def around_tools(words: list[Words], others: list[Words]) -> list[Words]:
    """Words that hold the functions become what stands before and after them: what two renders have in common."""
    holding = [index for index, own in enumerate(words) if TOOL_MARK in own.text]
    if len(holding) != 1 or len(words) != len(others):
        what = "does not print the functions of 'tools'" if not holding else "prints the functions of 'tools' twice"
        raise UserError(f"the chat template {what}: {FIX}")
    one, other = words[holding[0]].text, others[holding[0]].text
    before = _common_start(one, other)
    after = _common_start(one[len(before) :][::-1], other[len(before) :][::-1])[::-1]
    return [Words(before, after) if index == holding[0] else own for index, own in enumerate(words)]


def _common_start(one: str, other: str) -> str:
    length = next(
        (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return one[:length]


def unproven(turn: int, shape: TurnShape, how: str = "as it is in the data") -> UserError:
    hint = " (as templates do that remove <think> parts)" if "</think>" in shape.pattern else ""
    return UserError(f"the chat template does not print turn {turn} ({shape.role!r}) {how}{hint}: {FIX}")
