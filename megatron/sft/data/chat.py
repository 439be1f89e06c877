"""Renders a conversation with the tokenizer's own chat template and proves which characters of the text are trained.

Proof: the same turns are rendered once with marks in place of their texts, which shows the template's own words around
every text. A conversation's render must then be exactly those words and its own texts, from the first character to the
last; so each answer's place is known, and a template that drops or changes text cannot go unnoticed. The cost is linear
in the length of the conversation, and right for templates whose shorter renders are no prefixes of longer ones.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jinja2

from megatron.sft.data.conversations import Conversation
from megatron.sft.errors import UserError

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
THINK_TAG = re.compile(r"(</?think>)")
FIX = "give the tokenizer's folder a chat template that prints every text in full, or change the data"


@dataclass(frozen=True)
class Answer:
    """Character positions of one answer in a render: [start, text_start) is what the template puts before the answer's
    text after the generation prompt, `end` is just after the end-of-turn token."""

    start: int
    text_start: int
    end: int
    end_of_turn_id: int


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text. `trained` holds the character spans [start, end) on which the loss is taken."""

    text: str
    trained: tuple[tuple[int, int], ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Slot:
    """What the template writes around one turn's text. The last three are for assistant turns."""

    before: str  # from the end of the turn before to the end of the generation prompt
    inserted: str = ""  # then, as in Qwen3's empty <think> block; the model must write it, so it is trained
    end_of_turn: str = ""  # after the text, to the end of the end-of-turn token
    end_of_turn_id: int = -1


@dataclass(frozen=True)
class Skeleton:
    """The template's own words for one sequence of roles."""

    slots: tuple[Slot, ...]
    ending: str


@dataclass
class ChatTemplate:
    """The chat template of a (fast) tokenizer of transformers. `notes` collects what a user should read once."""

    tokenizer: Any
    notes: set[str] = field(default_factory=set)
    end_of_turn_ids: set[int] = field(default_factory=set)
    control_tokens: set[str] = field(default_factory=set)  # the special tokens that the template itself writes

    def __post_init__(self) -> None:
        self.text: str = self.tokenizer.get_chat_template()
        self.has_generation_tags = GENERATION_TAG.search(self.text) is not None
        self._added_tokens: dict[str, int] = self.tokenizer.get_added_vocab()
        self._special_tokens = [str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        self._skeletons: dict[tuple[str, ...], Skeleton] = {}

    def render(self, messages: Conversation) -> Rendered:
        """The text and its trained spans. What cannot be proven is a `UserError`; the caller adds file and line."""
        roles = tuple(message["role"] for message in messages)
        skeleton = self._skeletons.get(roles)
        if skeleton is None:
            skeleton = self._skeletons[roles] = self._skeleton(roles)
        if not self.has_generation_tags:
            text = self._text(messages)
            answers = find_answers(text, messages, skeleton)
            return Rendered(text, tuple((answer.start, answer.end) for answer in answers), answers)
        text, trained = self._text_and_generation(messages)
        answers = find_answers(text, messages, skeleton)
        self._check_generation(trained, answers)
        return Rendered(text, trained, answers)

    def _text(self, messages: Conversation, prompt: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise _refused(error) from None
        return text

    def _text_and_generation(self, messages: Conversation) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The render and the spans that the template marks with {% generation %}, as transformers finds them."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise _refused(error) from None
        return texts[0], tuple((start, end) for start, end in spans[0])

    def _check_generation(self, trained: tuple[tuple[int, int], ...], answers: tuple[Answer, ...]) -> None:
        """The template's own marks must take in every answer and its end of turn, one mark an answer."""
        if len(trained) != len(answers):
            raise UserError(
                f"the chat template has {len(trained)} generation blocks for {len(answers)} answers: correct it"
            )
        previous_end = 0
        for (start, end), answer in zip(trained, answers, strict=True):
            if start > answer.text_start or start < previous_end:
                raise UserError("the chat template's {% generation %} block begins after the answer does: correct it")
            if end < answer.end:
                raise UserError(
                    "the chat template's {% generation %} block leaves out the end-of-turn token: correct it"
                )
            if start < answer.start:
                self.notes.add(
                    "the chat template's {% generation %} block holds a part of the header: it is trained, too"
                )
            previous_end = end

    def _skeleton(self, roles: tuple[str, ...]) -> Skeleton:
        """Render marks in place of the texts, and cut the result at them."""
        marks = [f"MARK{index}OF{len(roles)}TEXT" for index in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        text = self._text(messages)
        starts = [text.find(mark) for mark in marks]
        for index, role in enumerate(roles):
            if text.count(marks[index]) != 1 or starts[index] < max(starts[:index], default=0):
                raise UserError(
                    f"the chat template does not print turn {index} ({role!r}) once and in its place: {FIX}"
                )
        ends = [start + len(mark) for start, mark in zip(starts, marks, strict=True)]
        slots = []
        for index, role in enumerate(roles):
            previous_end = ends[index - 1] if index else 0
            if role != "assistant":
                slots.append(Slot(text[previous_end : starts[index]]))
                continue
            prompt = self._text(messages[:index], prompt=True)
            answer_start = self._answer_start(text, prompt, previous_end, starts[index])
            following = text[ends[index] : starts[index + 1] if index + 1 < len(roles) else len(text)]
            end_of_turn, token_id = self._end_of_turn(following)
            before, inserted = text[previous_end:answer_start], text[answer_start : starts[index]]
            slots.append(Slot(before, inserted, end_of_turn, token_id))
            if inserted:
                self.notes.add(
                    f"the chat template writes {inserted!r} itself before the text of some answers; it is trained, "
                    "as the model has to write it after its prompt"
                )
        skeleton = Skeleton(tuple(slots), text[ends[-1] :])
        self._remember_control_tokens(skeleton)
        return skeleton

    def _answer_start(self, text: str, prompt: str, previous_end: int, mark_start: int) -> int:
        """Where the answer begins that the model has to write: at the end of the prompt that inference gives it."""
        if text.startswith(prompt) and previous_end <= len(prompt) <= mark_start:
            return len(prompt)
        if prompt.startswith(text[:mark_start]):
            extra = prompt[mark_start:]
            self.notes.add(
                f"the chat template ends its prompt for a new answer with {extra!r}, which is not in its text of whole "
                "conversations: the model will be asked to go on from something that it is not trained on"
            )
            return mark_start
        raise UserError(
            f"the chat template's prompt for an answer is not what stands before that answer in a whole text: {FIX}"
        )

    def _end_of_turn(self, following: str) -> tuple[str, int]:
        """The text from the end of an answer to the end of its end-of-turn token, and that token's id."""
        stripped = following.lstrip()
        tokens = [token for token in self._added_tokens if stripped.startswith(token)]
        if not tokens:
            raise UserError(
                f"the chat template writes {following[:20]!r} after an answer, which begins with no added token, so "
                "the model would not learn to stop: end answers with a special token in the template"
            )
        token = max(tokens, key=len)
        return following[: len(following) - len(stripped)] + token, self._added_tokens[token]

    def _remember_control_tokens(self, skeleton: Skeleton) -> None:
        self.end_of_turn_ids.update(slot.end_of_turn_id for slot in skeleton.slots if slot.end_of_turn)
        own_words = "".join(slot.before + slot.end_of_turn for slot in skeleton.slots) + skeleton.ending
        self.control_tokens.update(token for token in self._special_tokens if token in own_words)
        bos = self.tokenizer.bos_token
        start = skeleton.slots[0].before
        if not bos:
            return
        if start.startswith(bos + bos):
            raise UserError(f"the chat template begins with {bos!r} twice: remove one")
        if not start.startswith(bos) and self.tokenizer("a").input_ids[0] == self.tokenizer.bos_token_id:
            self.notes.add(f"the chat template does not print {bos!r}, so no conversation begins with it")


def find_answers(text: str, messages: Conversation, skeleton: Skeleton) -> tuple[Answer, ...]:
    """Read all of `text` as the template's words and the messages' texts in turn."""
    answers = []
    position = len(skeleton.slots[0].before)
    if not text.startswith(skeleton.slots[0].before):
        raise _unproven(messages, 0)
    for index, (message, slot) in enumerate(zip(messages, skeleton.slots, strict=True)):
        is_last = index + 1 == len(messages)
        following = skeleton.ending if is_last else skeleton.slots[index + 1].before
        found = _find_text(text, position, message["content"], slot, following)
        if found is None:
            raise _unproven(messages, index)
        text_start, text_end = found
        if slot.end_of_turn:
            answers.append(Answer(position, text_start, text_end + len(slot.end_of_turn), slot.end_of_turn_id))
        position = text_end + len(following)
    if position != len(text):
        raise _unproven(messages, len(messages) - 1)
    return tuple(answers)


def _find_text(text: str, position: int, content: str, slot: Slot, following: str) -> tuple[int, int] | None:
    """Where `content` stands, at `position` or after what the template inserts there; `following` must come next."""
    for start in dict.fromkeys((position + len(slot.inserted), position)):
        if start != position and not text.startswith(slot.inserted, position):
            continue
        for variant in _variants(content):
            if text.startswith(variant, start) and text.startswith(following, start + len(variant)):
                return start, start + len(variant)
    if slot.end_of_turn and THINK_TAG.search(content):
        pattern = _think_pattern(content, following)
        for opening in ("", "<think>\n", "<think>"):  # the prompt may hold the opening tag
            match = pattern.match(text, position - len(opening)) if slot.before.endswith(opening) else None
            if match:
                return position, match.end(1)
    return None


def _variants(content: str) -> Iterator[str]:
    """The text itself, then what templates make of it by trimming white space at its ends."""
    yield content
    yield content.strip()
    yield content.lstrip()
    yield content.rstrip()
    yield content.lstrip("\n")
    yield content.strip("\n")


def _think_pattern(content: str, following: str) -> "re.Pattern[str]":
    """The answer, with any white space beside its <think> tags: templates write their own line breaks there."""
    pieces = [piece if THINK_TAG.fullmatch(piece) else piece.strip() for piece in THINK_TAG.split(content)]
    return re.compile("(" + r"\s*".join(map(re.escape, pieces)) + ")" + re.escape(following))


def _refused(error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"the chat template refuses this conversation ({reason}): change the row, or the template")


def _unproven(messages: Conversation, index: int) -> UserError:
    role, content = messages[index]["role"], messages[index]["content"]
    hint = " (as templates do that remove <think> parts)" if "</think>" in content else ""
    return UserError(f"the chat template does not print turn {index} ({role!r}) as it is in the data{hint}: {FIX}")
