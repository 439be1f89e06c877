"""Corrections of published chat templates that leave text of the data out of what they print.

Each is an edit of the template's own text at the place that drops something, and leaves alone whatever the template
prints without loss. A template is corrected only where the data needs it; the user sees the difference, and the
corrected template is kept with the data, for the export to write.
"""

import difflib
import re
from dataclasses import dataclass
from typing import Any

from megatron.sft.runtime.errors import UserError


@dataclass(frozen=True)
class Correction:
    """`pattern` finds what is wrong in templates that hold all of `only_with` and not `without`."""

    pattern: "re.Pattern[str]"
    replacement: str
    only_with: tuple[str, ...] = ()
    without: str | None = None


OPEN, CLOSE = r"\{%-?\s*", r"\s*-?%\}\s*"
REMOVED_THOUGHT = re.compile(
    rf"{OPEN}if '</think>' in content{CLOSE}{OPEN}set content = content\.split\('</think>'\)\[-1\]{CLOSE}{OPEN}endif\s*-?%\}}"
)
REASONING = (
    # DeepSeek-R1 and its distillations drop the reasoning of every answer ...
    Correction(REMOVED_THOUGHT, ""),
    # ... and open it in their prompt, so that a model could neither begin otherwise nor learn to begin so.
    Correction(re.compile(r"(<｜Assistant｜>)<think>(?:\\n|\n)?(?=['\"]\s*-?\}\})"), r"\1"),
    # Qwen3 drops the reasoning of all answers but those after the last question.
    Correction(
        re.compile(r"(if loop\.index0 > ns\.last_query_index)(?=\s*-?%\})"),
        r"\1 or reasoning_content",
        only_with=("set reasoning_content", "</think>"),
    ),
)
SYSTEM = (
    # Mistral puts the system text before the last question, which a whole conversation does not end with.
    Correction(
        re.compile(r"if loop\.last and system_message is defined"), "if loop.first and system_message is defined"
    ),
)
CALLS = (
    # DeepSeek-V3 and R1 print calls only beside a content of none, which transformers leaves out of messages, ...
    Correction(
        re.compile(r"(message\['role'\] == 'assistant' and )message\['content'\] is none"),
        r"\1message['tool_calls']",
        only_with=("<｜tool▁calls▁begin｜>",),
    ),
    Correction(
        re.compile(r"(message\['role'\] == 'assistant' and )message\['content'\] is not none"),
        r"\1not message['tool_calls']",
        only_with=("<｜tool▁calls▁begin｜>",),
    ),
    # ... end them only where there are several, ...
    Correction(
        re.compile(r"(\{\{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'\}\})(\{%- endif %\}\{%- endfor %\})"),
        r"\2\1{%- set ns.is_tool = false -%}",
    ),
    # ... do not begin the second calls or the second results of a conversation, and go on after results as after a question.
    Correction(
        re.compile(r"\{%- set ns\.is_tool = false -%\}(\{%- for tool in message\['tool_calls'\]\s*%\})"),
        r"{%- set ns.is_first = false -%}\1",
    ),
    Correction(
        re.compile(r"\{\{'<｜Assistant｜>(<｜tool▁calls▁begin｜>)"),
        r"{{('<｜tool▁outputs▁end｜>' if ns.is_tool else '<｜Assistant｜>') + (message['content'] or '') + '\1",
    ),
    Correction(
        re.compile(r"(\{%- if message\['role'\] == 'user' %\}\{%- set ns\.is_tool = false -%\})"),
        r"{%- if message['role'] == 'assistant' %}{%- set ns.is_output_first = true -%}{%- endif %}\1",
        only_with=("set ns.is_output_first = false",),
        without="set ns.is_output_first = true",
    ),
)


def candidates(template: str) -> list[str]:
    """Corrected templates to try, those that change least first. None if no correction applies."""
    found = [corrected(template, group) for group in (REASONING, SYSTEM, CALLS, REASONING + SYSTEM + CALLS)]
    return [text for text in dict.fromkeys(found) if text != template]


def corrected(template: str, corrections: tuple[Correction, ...] = REASONING + SYSTEM + CALLS) -> str:
    for one in corrections:
        if all(text in template for text in one.only_with) and (one.without is None or one.without not in template):
            template = one.pattern.sub(one.replacement, template)
    return template


def difference(before: str, after: str) -> str:
    """The changed parts of a template, in the form of `diff -u`; one-line templates are cut at their tags."""
    names = ("the model's chat template", "the chat template used")
    lines = difflib.unified_diff(_pieces(before), _pieces(after), *names, lineterm="", n=1)
    return "\n".join(lines)


def _pieces(template: str) -> list[str]:
    return [line for line in re.split(r"(?=\{%|\{\{)|\n", template) if line]


# content.split('</think>')[-1], which cuts the thinking out of earlier answers.
_CUT = re.compile(r"""(\w+(?:\.\w+|\[['"]\w+['"]\])*)\.split\(\s*(['"])</think>\2\s*\)\s*\[-1\]""")
# <think> with its line break at the end of a piece of output, where an answer is to begin.
_OPENED = re.compile(r"""<think>(?:\\n|\n)*(?=(['"])\s*-?\}\})""")
_PROBE = [
    {"role": "user", "content": "QUESTION"},
    {"role": "assistant", "content": "<think>\nTHOUGHT\n</think>\n\nANSWER"},
    {"role": "user", "content": "MORE"},
]


def keep_thinking(template: str) -> str:
    """The template without the cut of `</think>` and without the `<think>` that it opens answers with.

    The line break after that `<think>` goes too, so that a prompt for generation ends as it did in front of a trained answer.
    """
    return _OPENED.sub("", _CUT.sub(lambda match: match[1], template))


def check_keeps_thinking(tokenizer: Any, template: str, where: str) -> None:
    """Render a conversation: the thinking must be there once and whole, and the prompt must not end with `<think>`."""
    text = tokenizer.apply_chat_template(_PROBE, chat_template=template, tokenize=False, add_generation_prompt=True)
    history = text.partition("MORE")[0]
    if (
        text.rstrip().endswith("<think>")
        or history.count("THOUGHT") != 1
        or "<think>\nTHOUGHT\n</think>" not in history
    ):
        raise UserError(
            f"the chat template of {where} treats <think> in a way that --keep-thinking does not know: "
            "edit a copy of it by hand and give it with --template FILE"
        )
