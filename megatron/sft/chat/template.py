"""Renders a conversation with a chat template and proves which characters of the text are trained.

Proof: turns of the same shape are rendered once with marks in place of their texts, which shows the template's own words
around every text (see skeletons.py). A conversation's render must then be exactly those words and its own texts, from the
first character to the last; so each answer's place is known, and a template that drops or changes text cannot go
unnoticed. The cost is linear in the length of the conversation, and right for templates whose shorter renders are no
prefixes of longer ones. A template that fails where a known correction of it does not is asked to be replaced by that.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from megatron.sft.chat.conversations import Messages
from megatron.sft.chat.corrections import candidates
from megatron.sft.chat.skeleton_maker import FIX, SkeletonMaker, Tools, unproven
from megatron.sft.chat.skeletons import (
    HOLE,
    AnswerSlots,
    CallStyle,
    Shape,
    Skeleton,
    TurnShape,
    dissect,
    in_style,
    marked,
    placed,
)
from megatron.sft.chat.template_sandbox import check_template
from megatron.sft.runtime.errors import UserError

TRAIN_ON = ("all_assistant", "last_assistant", "all")
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
CALL_STYLES = tuple(CallStyle(as_text, empty) for as_text in (False, True) for empty in (None, ""))


@dataclass(frozen=True)
class Answer:
    """Character positions of one answer in a render: [start, text_start) is what the template puts before the answer's
    text after the generation prompt, `end` is just after the end-of-turn token."""

    start: int
    text_start: int
    end: int
    end_of_turn_id: int


@dataclass(frozen=True)
class RenderedText:
    """A conversation as one text. `trained` holds the character spans [start, end) on which the loss is taken, `answers`
    the answers within them; if `everything`, the loss is taken on all but the first token."""

    text: str
    trained: tuple[tuple[int, int], ...]
    answers: tuple[Answer, ...]
    everything: bool = False


class CorrectionNeeded(UserError):  # noqa: N818 (asked for, not an error)
    """The chat template does not print what is in the data, but with a known correction it does."""

    def __init__(self, template: str, reason: str) -> None:
        super().__init__(f"{reason}; a known correction of the template does: see CHAT_TEMPLATE")
        self.template = template
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return CorrectionNeeded, (self.template, self.reason)  # worker processes hand it on


@dataclass
class ChatTemplate:
    """A chat template for a (fast) tokenizer of transformers, its own unless `text` is given. `notes` collects what a user
    should read once."""

    tokenizer: Any
    text: str = ""
    train_on: str = "all_assistant"
    notes: set[str] = field(default_factory=set)
    end_of_turn_ids: set[int] = field(default_factory=set)
    control_tokens: set[str] = field(default_factory=set)  # the special tokens that the template itself writes

    def __post_init__(self) -> None:
        self.text = self.text or template_of(self.tokenizer)
        if self.text:
            check_template(self.text)
        self.has_generation_tags = GENERATION_TAG.search(self.text) is not None
        self._special_tokens = [str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        self._skeletons = SkeletonMaker(self.tokenizer, self._text_of, self._call_style, self.notes, self._remember)
        self._style: CallStyle | None = None
        self._corrections: list[ChatTemplate] | None = None

    def render(self, messages: Messages, tools: Tools = None, wanted: Sequence[bool | None] = ()) -> RenderedText:
        """The text and its trained spans. `wanted` says of each message whether it is trained, None where `train_on`
        decides. What cannot be proven is a `UserError`; the caller adds file and line."""
        try:
            return self._rendered(messages, tools, wanted)
        except UserError as error:
            for correction in self._corrected():
                try:
                    correction._rendered(messages, tools, wanted)
                except UserError:
                    continue
                raise CorrectionNeeded(correction.text, str(error)) from None
            raise

    def render_text(self, text: str) -> RenderedText:
        """A text that is learned as it is: no template, but the tokenizer's beginning and end of a document."""
        if not self.tokenizer.eos_token:
            raise UserError("the tokenizer has no eos_token, which ends a text: set it in tokenizer_config.json")
        text = (self.tokenizer.bos_token if self._adds_bos() else "") + text + self.tokenizer.eos_token
        return RenderedText(text, ((0, len(text)),), (), everything=True)

    def tokens_of(self, messages: Messages, tools: Tools) -> list[int]:
        """The tokens that transformers makes of a conversation by itself."""
        encoding = self.tokenizer.apply_chat_template(
            self._in_style(messages), tools=tools, chat_template=self.text, tokenize=True, return_dict=True
        )
        return list(encoding["input_ids"])

    def _corrected(self) -> "list[ChatTemplate]":
        if self._corrections is None:
            texts = candidates(self.text)
            self._corrections = [ChatTemplate(self.tokenizer, text, self.train_on) for text in texts]
        return self._corrections

    def _rendered(self, messages: Messages, tools: Tools, wanted: Sequence[bool | None]) -> RenderedText:
        if not self.text:
            raise UserError(
                f"tokenizer folder {self.tokenizer.name_or_path} has no chat template: set CHAT_TEMPLATE (chatml, llama-3, "
                "a file), or give the folder of the family's chat (instruct) model"
            )
        if self.has_generation_tags:
            text, spans = self._text_and_generation(messages, tools)
            answers = self._answers(text, messages, tools)
            self._check_generation(spans, answers)
        else:
            text = self._text(messages, tools)
            answers = self._answers(text, messages, tools)
            spans = tuple((answer.start, answer.end) for answer in answers)
        chosen = [
            one
            for one, message in zip(self.trained_messages(messages, wanted), messages, strict=True)
            if message["role"] == "assistant"
        ]
        if self.train_on == "all":
            return RenderedText(text, ((0, len(text)),), answers, everything=True)
        trained = tuple(span for span, is_chosen in zip(spans, chosen, strict=True) if is_chosen)
        return RenderedText(text, trained, tuple(answer for answer, one in zip(answers, chosen, strict=True) if one))

    def trained_messages(self, messages: Messages, wishes: Sequence[bool | None] = ()) -> tuple[bool, ...]:
        """Whether each message is trained: as its own wish says, else as `train_on` does."""
        wishes = wishes or [None] * len(messages)
        own = [wish for wish, message in zip(wishes, messages, strict=True) if message["role"] == "assistant"]
        if self.train_on == "all" and False in own:
            raise UserError("a turn is not to be trained (loss, train or weight is 0), but TRAIN_ON=all: change either")
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        first = last if self.train_on == "last_assistant" else 0
        return tuple(
            message["role"] == "assistant" and (index >= first if wish is None else wish)
            for index, (message, wish) in enumerate(zip(messages, wishes, strict=True))
        )

    def _answers(self, text: str, messages: Messages, tools: Tools) -> tuple[Answer, ...]:
        """Where the answers stand in `text`, all of which is accounted for."""
        previous: Shape = ()
        failed = 0
        for exact in (False, True):
            dissected = [dissect(message, exact) for message in messages]
            shape = tuple(turn for turn, _ in dissected)
            if shape == previous:
                break
            previous = shape
            skeleton = self._skeletons.of(shape, tools is not None)
            found = placed(skeleton, text, [texts for _, texts in dissected])
            if isinstance(found, list):
                answers = tuple(_answer(one, found) for one in skeleton.answers)
                self._check_tools(text[: answers[0].start], tools)
                return answers
            failed = found
        raise unproven(failed, shape[failed])

    def _check_tools(self, before: str, tools: Tools) -> None:
        for tool in tools or ():
            name = tool["function"]["name"]
            if name not in before and json.dumps(name)[1:-1] not in before:
                raise UserError(f"the chat template does not print the function {name!r} of 'tools': {FIX}")

    def _text(self, messages: Messages, tools: Tools = None, prompt: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                self._in_style(messages),
                tools=tools,
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise _refused(error) from None
        return text

    def _text_of(self, messages: Messages, tools: Tools, prompt: bool) -> str:
        return self._text(messages, tools, prompt)

    def _text_and_generation(self, messages: Messages, tools: Tools) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The render and the spans that the template marks with {% generation %}, as transformers finds them."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[self._in_style(messages)],
                tools=tools,
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

    def _in_style(self, messages: Messages) -> Messages:
        if not any("tool_calls" in message for message in messages):
            return messages
        style = self._call_style()
        return [in_style(message, style) for message in messages]

    def _call_style(self) -> CallStyle:
        """How the template wants calls: found by trying which way it prints them."""
        if self._style is not None:
            return self._style
        turn = TurnShape("assistant", "", (True,))
        for style in CALL_STYLES:
            messages, marks = marked((TurnShape("user", HOLE), turn), style)
            try:
                text: str = self.tokenizer.apply_chat_template(messages, chat_template=self.text, tokenize=False)
            except Exception:  # whatever a template does with what it is not made for
                continue
            if all(mark in text for mark in marks[1][:2]):
                self._style = style
                return style
        raise UserError(f"the chat template does not print the calls of 'tool_calls': {FIX}")

    def _adds_bos(self) -> bool:
        return self.tokenizer.bos_token_id is not None and self.tokenizer("a").input_ids[:1] == [
            self.tokenizer.bos_token_id
        ]

    def _remember(self, skeleton: Skeleton, shape: Shape) -> None:
        """What users should know of the template's own words, and its special tokens."""
        for answer in skeleton.answers:
            self.end_of_turn_ids.add(answer.end_of_turn_id)
        own_words = "".join(slot.words.text + (slot.words.ending or "") for slot in skeleton.slots) + skeleton.ending
        self.control_tokens.update(token for token in self._special_tokens if token in own_words)
        for answer in skeleton.answers:
            pattern = shape[skeleton.slots[answer.first].turn].pattern
            if answer.inserted.strip() and pattern == HOLE:
                self.notes.add(
                    f"the chat template writes {answer.inserted!r} itself before the text of some answers; it is trained, "
                    "as the model has to write it after its prompt"
                )
        bos = self.tokenizer.bos_token
        start = skeleton.slots[0].words.text
        if not bos:
            return
        if start.startswith(bos + bos):
            raise UserError(f"the chat template begins with {bos!r} twice: remove one")
        if not start.startswith(bos) and self._adds_bos():
            self.notes.add(f"the chat template does not print {bos!r}, so no conversation begins with it")


def template_of(tokenizer: Any) -> str:
    """The tokenizer's own chat template; empty if it has none."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        return ""


def _answer(one: AnswerSlots, spans: list[tuple[int, int]]) -> Answer:
    text_start, end = spans[one.first][0], spans[one.last][1]
    return Answer(text_start - len(one.inserted), text_start, end + len(one.closing), one.end_of_turn_id)


def _refused(error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"the chat template refuses this conversation ({reason}): change the row, or the template")
