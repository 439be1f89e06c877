"""One text of a chat template with its arguments: renders messages, and finds the answers in what it renders."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, datetime, time
from functools import cached_property
from typing import Any

import jinja2

from megatron.sft.chat.call_arguments import arguments_object, arguments_text
from megatron.sft.chat.skeleton import Answer, CallPattern, TextNotFound, TurnPattern, marked_message, split_message
from megatron.sft.chat.skeleton_builder import EMPTY_THINK, FIX, SkeletonBuilder, not_printed
from megatron.sft.chat.turns import Message, Messages, Tools
from megatron.sft.runtime.errors import UserError

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Whatever a template does with what it is not made for.
TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, LookupError, ValueError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip

Spans = tuple[tuple[int, int], ...]  # of characters, each [start, end)


@dataclass(frozen=True)
class Learned:
    """What rendering shows of a template: `notes` that a user should read once, the tokens that end answers, and the special
    tokens that the template itself writes."""

    notes: set[str] = field(default_factory=set)
    end_of_turn_ids: set[int] = field(default_factory=set)
    control_tokens: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class CallStyle:
    """How a template prints calls: which arguments as they are if given as text, objects as `whole` JSON text, parameter by
    parameter ("parts") or not at all ("text": they are given as text), and what stands for an empty content."""

    objects: str
    prints_texts: bool
    no_content: str | None

    def applied(self, message: Message) -> Message:
        """The message with its calls in this style."""
        if "tool_calls" not in message:
            return message
        calls = []
        for call in message["tool_calls"]:
            arguments = call["function"]["arguments"]
            if self.objects == "text":
                arguments = arguments_text(arguments)
            elif not self.prints_texts:
                arguments = arguments_object(arguments)
            calls.append(call | {"function": call["function"] | {"arguments": arguments}})
        return message | {"tool_calls": calls, "content": message["content"] or self.no_content}


@dataclass
class Renderer:
    """A chat template's `text` for a (fast) tokenizer of transformers. `kwargs`: its arguments in addition to messages
    and functions; `day`: the date that it prints."""

    tokenizer: Any
    text: str
    kwargs: dict[str, Any]
    day: date
    learned: Learned

    def __post_init__(self) -> None:
        learned = self.learned
        self._prints_date = "strftime_now" in self.text
        self.has_generation_blocks = GENERATION_TAG.search(self.text) is not None
        self._strftime_now = _clock(self.day)
        self._builder = SkeletonBuilder(
            self.tokenizer, self.render, learned.notes, learned.end_of_turn_ids, learned.control_tokens
        )

    def styled(self, messages: Messages) -> Messages:
        """The messages as the template wants their calls."""
        if not any("tool_calls" in message for message in messages):
            return messages
        return [self._call_style.applied(message) for message in messages]

    def render(self, messages: Messages, tools: Tools = None, prompt: bool = False) -> str:
        """The text of styled messages; with `prompt` it ends with what inference gives the model to continue from."""
        text: str = self._apply(messages, tools, tokenize=False, add_generation_prompt=prompt)
        return text

    def tokens(self, messages: Messages, tools: Tools) -> list[int]:
        """The tokens that transformers itself makes of styled messages."""
        return list(self._apply(messages, tools, tokenize=True, return_dict=True)["input_ids"])

    def render_with_blocks(self, messages: Messages, tools: Tools) -> tuple[str, Spans]:
        """The text, and what the template marks with {% generation %}, as transformers finds it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            self._set_date()
            texts, spans = render_jinja_template(
                conversations=[[_without_nones(message) for message in messages]],
                tools=tools,
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map | self.kwargs,
            )
        except TEMPLATE_ERRORS as error:
            raise _refused(error) from None
        return texts[0], tuple((start, end) for start, end in spans[0])

    def answers(self, render: str, messages: Messages, tools: Tools) -> tuple[Answer, ...]:
        """Where the answers are in the render of styled messages, all of which is accounted for. Few templates need the exact
        patterns, or calls in parts."""
        has_calls = any("tool_calls" in message for message in messages)
        wholes = (True, False) if has_calls and self._call_style.objects == "whole" else (not has_calls,)
        patterns: list[tuple[TurnPattern, ...]] = []
        failed: UserError | None = None
        for whole, exact in ((whole, exact) for whole in wholes for exact in (False, True)):
            split = [split_message(message, exact, whole) for message in messages]
            pattern = tuple(turn for turn, _ in split)
            if pattern in patterns:
                continue
            patterns.append(pattern)
            try:
                skeleton = self._builder.skeleton(pattern, tools is not None)
                answers = skeleton.find_answers(render, [texts for _, texts in split])
            except TextNotFound as error:
                failed = failed or not_printed(error.turn, pattern[error.turn])
            except UserError as error:
                failed = failed or error
            else:
                _check_functions(render[: answers[0].start] if answers else render, tools)
                return answers
        assert failed is not None
        raise failed

    @cached_property
    def prints_empty_think(self) -> bool:
        """Whether the template writes an empty <think> block into an answer without reasoning, or gives one in its prompt."""
        question, answer = ({"role": role, "content": f"MARK{role}"} for role in ("user", "assistant"))
        try:
            texts = [self.render([question, answer]), self.render([question], None, True)]
        except UserError:
            return False
        return any(EMPTY_THINK.search(text.partition("MARKuser")[2]) is not None for text in texts)

    def _apply(self, messages: Messages, tools: Tools, **options: Any) -> Any:
        try:
            self._set_date()
            return self.tokenizer.apply_chat_template(messages, tools=tools, chat_template=self.text, **options, **self.kwargs)
        except TEMPLATE_ERRORS as error:
            raise _refused(error) from None

    def _set_date(self) -> None:
        """Fix the one function by which a template can ask for time. transformers keeps compiled templates by their text."""
        if self._prints_date:
            from transformers.utils.chat_template_utils import _compile_jinja_template

            _compile_jinja_template(self.text).globals["strftime_now"] = self._strftime_now

    @cached_property
    def _call_style(self) -> CallStyle:
        """The first style in which the template prints a call."""
        for objects in ("whole", "parts", "text"):
            for no_content in (None, ""):
                if self._prints(CallStyle(objects, objects == "text", no_content)):
                    prints_texts = self._prints(CallStyle("text", True, no_content))
                    return CallStyle(objects, prints_texts, no_content)
        raise UserError(f"the chat template does not print the calls of 'tool_calls': {FIX}")

    def _prints(self, style: CallStyle) -> bool:
        """Whether the template prints a call in this style."""
        shape = ("object", (0, ("text",))) if style.objects == "parts" else None
        pattern = TurnPattern("assistant", style.no_content, (CallPattern(True, style.objects == "text", shape),))
        message, marks = marked_message(1, pattern, 2)
        try:
            text = self.render([{"role": "user", "content": "MARKUSER"}, message])
        except Exception:  # whatever a template does with what it is not made for
            return False
        if style.objects == "parts" and str(message["tool_calls"][0]["function"]["arguments"]) in text:
            return False  # Python's spelling of an object, not a format of calls
        *name_and_arguments, id = marks.texts
        name = name_and_arguments[0]
        return all(mark in text for mark in name_and_arguments[1:]) and (name in text or id in text)


def _without_nones(message: Message) -> Message:
    """As apply_chat_template gives messages to templates."""
    return {name: value for name, value in message.items() if value is not None}


def _clock(day: date) -> Callable[[str], str]:
    return lambda form: datetime.combine(day, time()).strftime(form)


def _check_functions(before: str, tools: Tools) -> None:
    """Every function must be printed before the first answer."""
    for tool in tools or ():
        name = tool["function"]["name"]
        if name not in before and json.dumps(name)[1:-1] not in before:
            raise UserError(f"the chat template does not print the function {name!r} of 'tools': {FIX}")


def _refused(error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    if isinstance(error, jinja2.TemplateSyntaxError):
        return UserError(
            f"the chat template is not valid Jinja (line {error.lineno}: {reason}): correct it, or give another "
            "(CHAT_TEMPLATE=<name or file>)"
        )
    return UserError(f"the chat template refuses this conversation ({reason}): change the record, or the template")
