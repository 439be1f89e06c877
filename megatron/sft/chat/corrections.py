"""Corrections of published chat templates that leave text of the data out of what they print.

Each is an edit of the template's own text at the place that drops something, and leaves alone whatever the template
prints without loss. A template is corrected only where the data needs it; the user sees the difference, and the
corrected template is kept with the data, for the export to write.
"""

import difflib
import re
from dataclasses import dataclass


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
