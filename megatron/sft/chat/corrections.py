"""Corrections of published chat templates that drop text of the data.

Each is an edit of the template's text at the place that drops something; what the template prints without loss stays as it
is. Step 3 corrects a template only where the data needs it (`candidates`): the user sees the difference, and the corrected
template is kept with the data, for the export to write. `tools/edit_tokenizer --keep-thinking` corrects one beforehand.
"""

import difflib
import re
from dataclasses import dataclass
from typing import Any

from megatron.sft.runtime.console import SIGNS
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
# content.split('</think>')[-1], which cuts the thinking out of an answer.
CUT_THOUGHT = re.compile(r"""(\w+(?:\.\w+|\[['"]\w+['"]\])*)\.split\(\s*(['"])</think>\2\s*\)\s*\[-1\]""")
# <think> with its line break at the end of a piece of output, where an answer is to begin.
OPENED_THOUGHT = re.compile(r"""<think>(?:\\n|\n)*(?=(['"])\s*-?\}\})""")
REASONING: tuple[Correction, ...] = (
    # DeepSeek-R1 and its distillations drop the reasoning of every answer ...
    Correction(REMOVED_THOUGHT, ""),
    # ... and open it in their prompt, so that a model could neither begin an answer otherwise nor learn to begin it so.
    Correction(OPENED_THOUGHT, "", only_with=("<｜Assistant｜>",)),
    # Qwen3 drops the reasoning of all answers but those after the last question.
    Correction(
        re.compile(r"loop\.index0 > ns\.last_query_index(?: or not reasoning_content| and reasoning_content)?(?! or| and)"),
        r"\g<0> or reasoning_content",
        only_with=("set reasoning_content", "</think>"),
    ),
)
# Qwen3 and its successors write an empty <think> block into answers without reasoning, but only after the last question
# (Qwen3 of these into the last alone), so that one prompt has two beginnings. What to do about it, by EMPTY_THINK.
QWEN3_ANSWER = ("set reasoning_content", "<think>")
EMPTY_THINK: dict[str, tuple[Correction, ...]] = {
    "template": (),
    "every": (
        Correction(
            re.compile(r"loop\.index0 > ns\.last_query_index(?! or not)"), r"\g<0> or not reasoning_content", QWEN3_ANSWER
        ),
        Correction(re.compile(r"loop\.last or \(?(?:not loop\.last and )?reasoning_content\)?"), "true", QWEN3_ANSWER),
    ),
    "none": (
        Correction(re.compile(r"loop\.index0 > ns\.last_query_index(?! and)"), r"\g<0> and reasoning_content", QWEN3_ANSWER),
    ),
}
# GLM-4.5 drops it from all answers before the last question.
REASONING += (Correction(re.compile(r"loop\.index0 > ns\.last_user_index and reasoning_content"), "reasoning_content"),)
# GLM ends an answer with the beginning of the next turn, which the last one does not have.
ENDS = (
    Correction(
        re.compile(r"(\{%-?\s*endfor\s*-?%\})(\s*\{%-?\s*if add_generation_prompt\s*-?%\})"),
        r"\1{%- if not add_generation_prompt and messages[-1].role == 'assistant' -%}"
        r"{{ '<|observation|>' if messages[-1].tool_calls else '<|user|>' }}{%- endif -%}\2",
        only_with=("<|assistant|>", "<|observation|>"),
        without="messages[-1].role == 'assistant' -%}",
    ),
)
SYSTEM = (
    # Mistral puts the system text before the question that ends the conversation: a whole one ends with an answer.
    Correction(re.compile(r"if loop\.last and system_message is defined"), "if loop.first and system_message is defined"),
)
CALLS = (
    # DeepSeek-V3 and R1 print calls only where the content is none, which transformers removes from messages, ...
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
    # ... begin only the first calls and the first results of a conversation, and continue after results as after a question.
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


def candidates(template: str, empty_think: str = "template") -> list[str]:
    """Corrected templates to try, those that change least first; empty if no correction applies. `empty_think`: a key of
    EMPTY_THINK."""
    blocks = EMPTY_THINK[empty_think]
    groups = (REASONING, SYSTEM, CALLS, ENDS, blocks, blocks + REASONING, blocks + REASONING + SYSTEM + CALLS + ENDS)
    found = [corrected(template, group) for group in groups]
    return [text for text in dict.fromkeys(found) if text != template]


def corrected(template: str, corrections: tuple[Correction, ...]) -> str:
    for edit in corrections:
        if all(text in template for text in edit.only_with) and (edit.without is None or edit.without not in template):
            template = edit.pattern.sub(edit.replacement, template)
    return template


def difference(before: str, after: str) -> str:
    """The changed parts of a template, in the form of `diff -u`; one-line templates are cut at their tags.
    Control characters are SIGNS."""
    names = ("the model's chat template", "the chat template used")
    lines = difflib.unified_diff(_pieces(before), _pieces(after), *names, lineterm="", n=1)
    return "\n".join(lines).translate(SIGNS)


def _pieces(template: str) -> list[str]:
    return [line for line in re.split(r"(?=\{%|\{\{)|\n", template) if line]


def keep_thinking(template: str) -> str:
    """Any template without its cuts of the thinking and without the `<think>` that it begins answers with; the line break
    after that goes too, so that a prompt ends where a trained answer begins. `check_keeps_thinking` says if that was all."""
    return corrected(template, (Correction(CUT_THOUGHT, r"\1"), Correction(OPENED_THOUGHT, "")))


def check_keeps_thinking(tokenizer: Any, template: str, where: str) -> None:
    """Render a conversation: the thinking must be there once and whole, and the prompt must not end with `<think>`. If not,
    a `UserError` about the template of `where`."""
    messages = [
        {"role": "user", "content": "QUESTION"},
        {"role": "assistant", "content": "<think>\nTHOUGHT\n</think>\n\nANSWER"},
        {"role": "user", "content": "MORE"},
    ]
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    history = text.partition("MORE")[0]
    is_kept = history.count("THOUGHT") == 1 and "<think>\nTHOUGHT\n</think>" in history
    if not is_kept or text.rstrip().endswith("<think>"):
        raise UserError(
            f"the chat template of {where} treats <think> in a way that --keep-thinking does not know: "
            "edit a copy of it by hand and give it with --template FILE"
        )
