"""Renders a conversation with a chat template, and finds the characters on which the loss is taken (see skeleton.py).

A template that does not print all of the data, where a known correction of it does, asks to be replaced by that.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.sft.chat.conversations import Messages
from megatron.sft.chat.corrections import candidates, difference
from megatron.sft.chat.renderer import Learned, Renderer, Spans
from megatron.sft.chat.skeleton import THINKING, Answer
from megatron.sft.chat.skeleton_builder import adds_bos
from megatron.sft.chat.template_sandbox import check_template
from megatron.sft.chat.template_settings import check_arguments, unused_arguments
from megatron.sft.chat.turns import Tools
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import sha256_of_text

TRAIN_ON = ("all_assistant", "last_assistant", "all")
MAX_RENDERERS = 64  # of different template_kwargs, each with its skeletons


@dataclass(frozen=True)
class RenderedText:
    """A conversation as one text. The loss is taken on the characters of `trained`, each of which holds the answer of the
    same index; if `everything`, on all tokens but the first."""

    text: str
    trained: Spans
    answers: tuple[Answer, ...]
    everything: bool = False


class CorrectionNeeded(UserError):  # noqa: N818 (a request, not an error)
    """The chat template does not print what is in the data, but with a known correction it does. Both texts of the corrected
    template are given, the second for conversations with functions (empty if there is none)."""

    def __init__(self, template: str, reason: str, tool_template: str = "") -> None:
        super().__init__(f"{reason}; a known correction of the template does: see CHAT_TEMPLATE")
        self.template = template
        self.reason = reason
        self.tool_template = tool_template

    def at(self, place: str) -> "CorrectionNeeded":
        """The same with the place of the record, such as file and line."""
        return CorrectionNeeded(self.template, f"{place}: {self.reason}", self.tool_template)

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        # for pickling: worker processes pass it on
        return CorrectionNeeded, (self.template, self.reason, self.tool_template)


@dataclass
class ChatTemplate:
    """A chat template for a (fast) tokenizer of transformers, the tokenizer's unless `text` is given.

    tool_text: for conversations with functions, where a tokenizer has several templates (transformers' `tool_use`).
    empty_think: a key of corrections.EMPTY_THINK; day: the date that the template prints.
    """

    tokenizer: Any
    text: str = ""
    train_on: str = "all_assistant"
    tool_text: str = ""
    empty_think: str = "template"
    day: date = field(default_factory=date.today)
    learned: Learned = field(default_factory=Learned)

    def __post_init__(self) -> None:
        if not self.text:
            self.text, self.tool_text = templates_of(self.tokenizer)
        for text in filter(None, (self.text, self.tool_text)):
            check_template(text)
        self._renderers: dict[tuple[str, str], Renderer] = {}
        self._known_edits = True  # whether corrections can still be hoped to give answers one beginning

    @property
    def notes(self) -> set[str]:
        return self.learned.notes

    @property
    def end_of_turn_ids(self) -> set[int]:
        return self.learned.end_of_turn_ids

    @property
    def control_tokens(self) -> set[str]:
        return self.learned.control_tokens

    def render(
        self,
        messages: Messages,
        tools: Tools = None,
        loss_flags: Sequence[bool | None] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> RenderedText:
        """The text and its trained characters. `kwargs`: the record's own arguments for the template. What cannot be proven is
        a `UserError`, to which the caller adds file and line; it is a `CorrectionNeeded` where a correction of the template
        can be proven."""
        arguments = (messages, tools, loss_flags, kwargs or {})
        result: RenderedText | UserError
        try:
            result, has_other_beginnings = self._proven(*arguments)
        except UserError as error:
            result, has_other_beginnings = error, False
        if isinstance(result, RenderedText) and not (has_other_beginnings and self._known_edits):
            return result
        for text, tool_text, correction in self._corrections(tools):
            try:
                if correction._proven(*arguments)[1]:
                    continue
            except UserError:
                continue
            reason = f"the chat template does not treat empty <think> blocks as EMPTY_THINK={self.empty_think} wants"
            raise CorrectionNeeded(text, str(result) if isinstance(result, UserError) else reason, tool_text)
        if isinstance(result, UserError):
            raise result
        self._known_edits = False
        self.notes.add(
            f"the chat template writes an empty <think> block into some answers only, and no correction of it for "
            f"EMPTY_THINK={self.empty_think} is known: the data are rendered as it does"
        )
        return result

    def render_text(self, text: str) -> RenderedText:
        """A text that is learned as it is: no template, but the tokenizer's beginning and end of a document, where it lacks
        them."""
        if not self.tokenizer.eos_token:
            raise UserError("the tokenizer has no eos_token, which ends a text: set it in tokenizer_config.json")
        if found := next((token for token in self._special_tokens if token in text), None):
            self.notes.add(
                f"texts have special tokens in them, such as {found!r}: every token of a text is trained, those of questions "
                "too; to train answers alone give conversations as lists of turns"
            )
        begin, end = self.text_start, self.tokenizer.eos_token
        text = begin + text.removeprefix(begin) + ("" if text.endswith(end) else end)
        return RenderedText(text, ((0, len(text)),), (), everything=True)

    @cached_property
    def text_start(self) -> str:
        """The token that the tokenizer puts before a text; empty if it puts none."""
        return str(self.tokenizer.bos_token) if adds_bos(self.tokenizer) else ""

    @cached_property
    def _special_tokens(self) -> list[str]:
        return [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    def facts(self, own: tuple[str, str]) -> dict[str, Any]:
        """What a manifest says of the template; `own` are the tokenizer's templates."""
        texts = (self.text, self.tool_text)
        changes = [difference(before, after) for before, after in zip(own, texts, strict=True) if after and before != after]
        return {
            "chat_template": self.text,
            "tool_use_template": self.tool_text,
            "chat_template_sha256": sha256_of_text(self.text),
            "chat_template_changed": bool(changes),
            "chat_template_diff": "\n".join(changes),
            "empty_think": self.empty_think,
            "template_date": str(self.day) if any("strftime_now" in text for text in texts) else None,
        }

    def tokens_of(self, messages: Messages, tools: Tools, kwargs: dict[str, Any] | None = None) -> list[int]:
        """The tokens that transformers itself makes of a conversation."""
        renderer = self._renderer(tools, kwargs or {})
        return renderer.tokens(renderer.styled(messages), tools)

    def trained_messages(self, messages: Messages, loss_flags: Sequence[bool | None] = ()) -> tuple[bool, ...]:
        """Whether each message is trained: as its own flag says, else as `train_on` does."""
        loss_flags = loss_flags or [None] * len(messages)
        if self.train_on == "all" and False in _of_answers(messages, loss_flags):
            raise UserError("a turn is not to be trained (loss, train or weight is 0), but TRAIN_ON=all: change either")
        last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        if last < 0 and self.train_on != "all":
            raise UserError(
                "the record has no turn of an assistant, so there is no answer to learn: add one, or drop the record"
            )
        first = last if self.train_on == "last_assistant" else 0
        return tuple(
            message["role"] == "assistant" and (index >= first if flag is None else flag)
            for index, (message, flag) in enumerate(zip(messages, loss_flags, strict=True))
        )

    def _corrections(self, tools: Tools) -> "list[tuple[str, str, ChatTemplate]]":
        """Corrected texts to try, with their templates: of the text that is used for these functions."""
        return self._corrected_tools if tools is not None and self.tool_text else self._corrected

    @cached_property
    def _corrected(self) -> "list[tuple[str, str, ChatTemplate]]":
        return [(text, self.tool_text, self._with_text(text)) for text in candidates(self.text, self.empty_think)]

    @cached_property
    def _corrected_tools(self) -> "list[tuple[str, str, ChatTemplate]]":
        return [(self.text, text, self._with_text(text)) for text in candidates(self.tool_text, self.empty_think)]

    def _with_text(self, text: str) -> "ChatTemplate":
        return replace(self, text=text, tool_text="", learned=Learned())

    def _renderer(self, tools: Tools, kwargs: dict[str, Any]) -> Renderer:
        text = self.tool_text if tools is not None and self.tool_text else self.text
        if not text:
            raise UserError(
                f"{no_template(self.tokenizer, self.tokenizer.name_or_path)}: set CHAT_TEMPLATE (chatml, llama-3, "
                "a file), or give the folder of the family's chat (instruct) model"
            )
        key = (text, json.dumps(kwargs, sort_keys=True) if kwargs else "")
        found = self._renderers.get(key)
        if found is None:
            check_arguments(kwargs, "chat_template_kwargs")
            unused = unused_arguments(text, kwargs)
            for name in kwargs:
                uses = "which the chat template does not use" if name in unused else "which inference has to be given, too"
                self.notes.add(f"records have {name} in their chat_template_kwargs, {uses}")
            if len(self._renderers) >= MAX_RENDERERS:
                self._renderers.clear()
            found = self._renderers[key] = Renderer(self.tokenizer, text, kwargs, self.day, self.learned)
        return found

    def _proven(
        self, messages: Messages, tools: Tools, loss_flags: Sequence[bool | None], kwargs: dict[str, Any]
    ) -> tuple[RenderedText, bool]:
        """The text and its trained characters, and whether its answers begin otherwise than `empty_think` wants."""
        renderer = self._renderer(tools, kwargs)
        chosen = _of_answers(messages, self.trained_messages(messages, loss_flags))
        messages = renderer.styled(messages)
        if renderer.has_generation_blocks:
            text, spans = renderer.render_with_blocks(messages, tools)
            answers = renderer.answers(text, messages, tools)
            self._check_blocks(spans, answers)
        else:
            text = renderer.render(messages, tools)
            answers = renderer.answers(text, messages, tools)
            spans = tuple((answer.start, answer.end) for answer in answers)
        others = self.empty_think != "template" and renderer.prints_empty_think
        has_others = others and self._has_other_beginnings(messages, answers)
        if self.train_on == "all":
            return RenderedText(text, ((0, len(text)),), answers, everything=True), has_others
        indices = [index for index, is_chosen in enumerate(chosen) if is_chosen]
        trained = tuple(spans[index] for index in indices)
        return RenderedText(text, trained, tuple(answers[index] for index in indices)), has_others

    def _has_other_beginnings(self, messages: Messages, answers: tuple[Answer, ...]) -> bool:
        """Whether an answer without reasoning lacks an empty <think> block ("every"), or has one of the template's ("none")."""
        texts = (message["content"] or "" for message in messages if message["role"] == "assistant")
        pairs = zip(texts, answers, strict=True)
        if self.empty_think == "every":
            return any(not answer.has_empty_think and not _has_reasoning(text) for text, answer in pairs)
        return any(answer.has_empty_think and not THINKING.match(text) for text, answer in pairs)

    def _check_blocks(self, blocks: Spans, answers: tuple[Answer, ...]) -> None:
        """Each {% generation %} block must hold one answer with its end-of-turn token."""
        if len(blocks) != len(answers):
            raise UserError(f"the chat template has {len(blocks)} generation blocks for {len(answers)} answers: correct it")
        previous_end = 0
        for (start, end), answer in zip(blocks, answers, strict=True):
            if start > answer.text_start or start < previous_end:
                raise UserError("the chat template's {% generation %} block begins after the answer does: correct it")
            if end < answer.end:
                raise UserError("the chat template's {% generation %} block ends before the end-of-turn token: correct it")
            if start < answer.start:
                self.notes.add("the chat template's {% generation %} block holds a part of the header, which is trained, too")
            previous_end = end


def templates_of(tokenizer: Any) -> tuple[str, str]:
    """The tokenizer's chat template, and that which transformers uses for conversations with functions if it is another;
    empty if there is none."""
    text = template_of(tokenizer)
    several = isinstance(tokenizer.chat_template, dict)
    return text, str(tokenizer.chat_template.get("tool_use", "")) if several else ""


def template_of(tokenizer: Any) -> str:
    """The tokenizer's own chat template; empty if it has none."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        return ""


def no_template(tokenizer: Any, folder: Path | str) -> str:
    """That a tokenizer has no chat template, or only templates of other names than `default`."""
    if isinstance(tokenizer.chat_template, dict) and tokenizer.chat_template:
        names = ", ".join(sorted(tokenizer.chat_template))
        return f"tokenizer folder {folder} has no chat template named default, only {names}"
    return f"tokenizer folder {folder} has no chat template"


def _of_answers(messages: Messages, values: Sequence[Any]) -> list[Any]:
    return [value for value, message in zip(values, messages, strict=True) if message["role"] == "assistant"]


def _has_reasoning(text: str) -> bool:
    block = THINKING.match(text)
    return block is not None and bool(block[2])
