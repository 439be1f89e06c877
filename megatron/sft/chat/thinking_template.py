"""Chat templates of reasoning models: keeping the thinking of earlier answers, and leaving it to the model to begin it."""

import re
from typing import Any

from megatron.sft.runtime.errors import UserError

# content.split('</think>')[-1], which cuts the thinking out of earlier answers.
_CUT = re.compile(r"""(\w+(?:\.\w+|\[['"]\w+['"]\])*)\.split\(\s*(['"])</think>\2\s*\)\s*\[-1\]""")
# <think> with its line break at the end of a piece of output, where an answer is to begin.
_OPENED = re.compile(r"""<think>(?:\\n|\n)*(?=(['"])\s*-?\}\})""")
_PROBE = [
    {"role": "user", "content": "QUESTION"},
    {"role": "assistant", "content": "<think>\nTHOUGHT\n</think>\n\nANSWER"},
    {"role": "user", "content": "MORE"},
]


def keep_thinking(template: str, where: str) -> str:
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
