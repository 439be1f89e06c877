"""Renders a conversation with a chat template, and finds the characters on which the loss is taken (see skeleton.py).

A template that does not print all of the data, where a known correction of it does, asks to be replaced by that.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jinja2

from megatron.sft.chat.conversations import Messages
from megatron.sft.chat.corrections import candidates
from megatron.sft.chat.skeleton import Answer, TextNotFound, TurnPattern, arguments_text, join_message, split_message
from megatron.sft.chat.skeleton_builder import FIX, SkeletonBuilder, adds_bos, not_printed
from megatron.sft.chat.template_sandbox import check_template
from megatron.sft.chat.turns import Message, Tools
from megatron.sft.runtime.errors import UserError

TRAIN_ON = ("all_assistant", "last_assistant", "all")
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, KeyError, ValueError)

Spans = tuple[tuple[int, int], ...]  # of characters, each [start, end)


@dataclass(frozen=True)
class CallStyle:
    """How a template wants calls: arguments as JSON text or as an object, and what stands for an empty content."""

    arguments_as_text: bool
    no_content: str | None

    def applied(self, message: Message) -> Message:
        """The message with its calls in this style."""
        if "tool_calls" not in message:
            return message
        calls = []
        for call in message["tool_calls"]:
            arguments = call["function"]["arguments"]
            if self.arguments_as_text:
                arguments = arguments_text(arguments)
            elif isinstance(arguments, str):
                arguments = json.loads(arguments)
            calls.append(call | {"function": call["function"] | {"arguments": arguments}})
        return message | {"tool_calls": calls, "content": message["content"] or self.no_content}


@dataclass(frozen=True)
class RenderedText:
    """A conversation as one text. The loss is taken on the characters of `trained`, each of which holds the answer of the
    same index; if `everything`, on all tokens but the first."""

    text: str
    trained: Spans
    answers: tuple[Answer, ...]
    everything: bool = False


class CorrectionNeeded(UserError):  # noqa: N818 (a request, not an error)
    """The chat template does not print what is in the data, but with a known correction it does."""

    def __init__(self, template: str, reason: str) -> None:
        super().__init__(f"{reason}; a known correction of the template does: see CHAT_TEMPLATE")
        self.template = template
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return CorrectionNeeded, (self.template, self.reason)  # for pickling: worker processes pass it on


@dataclass
class ChatTemplate:
    """A chat template for a (fast) tokenizer of transformers, the tokenizer's unless `text` is given.

    `notes` collects what a user should read once, `end_of_turn_ids` the tokens that end answers, `control_tokens` the
    special tokens that the template itself writes.
    """

    tokenizer: Any
    text: str = ""
    train_on: str = "all_assistant"
    notes: set[str] = field(default_factory=set)
    end_of_turn_ids: set[int] = field(default_factory=set)
    control_tokens: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.text = self.text or template_of(self.tokenizer)
        if self.text:
            check_template(self.text)
        self._has_generation_tags = GENERATION_TAG.search(self.text) is not None
        self._builder = SkeletonBuilder(
            self.tokenizer, self._render, self.notes, self.end_of_turn_ids, self.control_tokens
        )

    def render(self, messages: Messages, tools: Tools = None, loss_flags: Sequence[bool | None] = ()) -> RenderedText:
        """The text and its trained characters. What cannot be proven is a `UserError`, to which the caller adds file and
        line; it is a `CorrectionNeeded` where a correction of the template can be proven."""
        try:
            return self._proven(messages, tools, loss_flags)
        except UserError as error:
            for correction in self._corrections:
                try:
                    correction._proven(messages, tools, loss_flags)
                except UserError:
                    continue
                raise CorrectionNeeded(correction.text, str(error)) from None
            raise

    def render_text(self, text: str) -> RenderedText:
        """A text that is learned as it is: no template, but the tokenizer's beginning and end of a document."""
        if not self.tokenizer.eos_token:
            raise UserError("the tokenizer has no eos_token, which ends a text: set it in tokenizer_config.json")
        text = (self.tokenizer.bos_token if adds_bos(self.tokenizer) else "") + text + self.tokenizer.eos_token
        return RenderedText(text, ((0, len(text)),), (), everything=True)

    def tokens_of(self, messages: Messages, tools: Tools) -> list[int]:
        """The tokens that transformers itself makes of a conversation."""
        encoding = self.tokenizer.apply_chat_template(
            self._in_call_style(messages), tools=tools, chat_template=self.text, tokenize=True, return_dict=True
        )
        return list(encoding["input_ids"])

    def trained_messages(self, messages: Messages, loss_flags: Sequence[bool | None] = ()) -> tuple[bool, ...]:
        """Whether each message is trained: as its own flag says, else as `train_on` does."""
        loss_flags = loss_flags or [None] * len(messages)
        if self.train_on == "all" and False in _of_answers(messages, loss_flags):
            raise UserError("a turn is not to be trained (loss, train or weight is 0), but TRAIN_ON=all: change either")
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        first = last if self.train_on == "last_assistant" else 0
        return tuple(
            message["role"] == "assistant" and (index >= first if flag is None else flag)
            for index, (message, flag) in enumerate(zip(messages, loss_flags, strict=True))
        )

    @cached_property
    def _corrections(self) -> "list[ChatTemplate]":
        return [ChatTemplate(self.tokenizer, text, self.train_on) for text in candidates(self.text)]

    def _proven(self, messages: Messages, tools: Tools, loss_flags: Sequence[bool | None]) -> RenderedText:
        if not self.text:
            raise UserError(
                f"tokenizer folder {self.tokenizer.name_or_path} has no chat template: set CHAT_TEMPLATE (chatml, llama-3, "
                "a file), or give the folder of the family's chat (instruct) model"
            )
        if self._has_generation_tags:
            text, spans = self._render_with_blocks(messages, tools)
            answers = self._answers(text, messages, tools)
            self._check_blocks(spans, answers)
        else:
            text = self._render(messages, tools)
            answers = self._answers(text, messages, tools)
            spans = tuple((answer.start, answer.end) for answer in answers)
        chosen = _of_answers(messages, self.trained_messages(messages, loss_flags))
        if self.train_on == "all":
            return RenderedText(text, ((0, len(text)),), answers, everything=True)
        indices = [index for index, is_chosen in enumerate(chosen) if is_chosen]
        return RenderedText(text, tuple(spans[index] for index in indices), tuple(answers[index] for index in indices))

    def _answers(self, render: str, messages: Messages, tools: Tools) -> tuple[Answer, ...]:
        """Where the answers are in the render, all of which is accounted for. Few templates need the exact patterns."""
        patterns, failed = [], 0
        for exact in (False, True):
            split = [split_message(message, exact) for message in messages]
            pattern = tuple(turn for turn, _ in split)
            if pattern in patterns:
                break
            patterns.append(pattern)
            try:
                skeleton = self._builder.skeleton(pattern, tools is not None)
                answers = skeleton.find_answers(render, [texts for _, texts in split])
            except TextNotFound as error:
                failed = error.turn
                continue
            _check_functions(render[: answers[0].start], tools)
            return answers
        raise not_printed(failed, patterns[-1][failed])

    def _render(self, messages: Messages, tools: Tools = None, prompt: bool = False) -> str:
        """The text; with `prompt` it ends with what inference gives the model to continue from."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                self._in_call_style(messages),
                tools=tools,
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except TEMPLATE_ERRORS as error:
            raise _refused(error) from None
        return text

    def _render_with_blocks(self, messages: Messages, tools: Tools) -> tuple[str, Spans]:
        """The text, and what the template marks with {% generation %}, as transformers finds it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[self._in_call_style(messages)],
                tools=tools,
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except TEMPLATE_ERRORS as error:
            raise _refused(error) from None
        return texts[0], tuple((start, end) for start, end in spans[0])

    def _check_blocks(self, blocks: Spans, answers: tuple[Answer, ...]) -> None:
        """Each {% generation %} block must hold one answer with its end-of-turn token."""
        if len(blocks) != len(answers):
            raise UserError(
                f"the chat template has {len(blocks)} generation blocks for {len(answers)} answers: correct it"
            )
        previous_end = 0
        for (start, end), answer in zip(blocks, answers, strict=True):
            if start > answer.text_start or start < previous_end:
                raise UserError("the chat template's {% generation %} block begins after the answer does: correct it")
            if end < answer.end:
                raise UserError(
                    "the chat template's {% generation %} block ends before the end-of-turn token: correct it"
                )
            if start < answer.start:
                self.notes.add(
                    "the chat template's {% generation %} block holds a part of the header, which is trained, too"
                )
            previous_end = end

    def _in_call_style(self, messages: Messages) -> Messages:
        if not any("tool_calls" in message for message in messages):
            return messages
        return [self._call_style.applied(message) for message in messages]

    @cached_property
    def _call_style(self) -> CallStyle:
        """The first style in which the template prints a call."""
        marks = ["MARKNAME", '{"MARKKEY": "value"}', "i0001x000"]
        conversation = [
            {"role": "user", "content": "MARKUSER"},
            join_message(TurnPattern("assistant", "", (True,)), marks),
        ]
        for style in (CallStyle(as_text, empty) for as_text in (False, True) for empty in (None, "")):
            try:
                messages = [style.applied(message) for message in conversation]
                text: str = self.tokenizer.apply_chat_template(messages, chat_template=self.text, tokenize=False)
            except Exception:  # whatever a template does with what it is not made for
                continue
            if marks[0] in text and marks[1] in text:
                return style
        raise UserError(f"the chat template does not print the calls of 'tool_calls': {FIX}")


def template_of(tokenizer: Any) -> str:
    """The tokenizer's own chat template; empty if it has none."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        return ""


def _of_answers(messages: Messages, values: Sequence[Any]) -> list[Any]:
    return [value for value, message in zip(values, messages, strict=True) if message["role"] == "assistant"]


def _check_functions(before: str, tools: Tools) -> None:
    """Every function must be printed before the first answer."""
    for tool in tools or ():
        name = tool["function"]["name"]
        if name not in before and json.dumps(name)[1:-1] not in before:
            raise UserError(f"the chat template does not print the function {name!r} of 'tools': {FIX}")


def _refused(error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"the chat template refuses this conversation ({reason}): change the record, or the template")
