"""What a chat template trains, decoded from tokens, for templates of any family."""

import re
from functools import cache
from typing import Any

import numpy as np

from megatron.sft.chat.conversations import Example, Messages
from megatron.sft.chat.encoding import check_against_template, encode, load_tokenizer
from megatron.sft.chat.template import ChatTemplate, CorrectionNeeded
from tests.support.material import npm_tokenizer

CONTROL = re.compile(r"<\|[A-Za-z_]+\|?>|\[/?[A-Z_]+\]|<｜[\w▁]+｜>|</s>|<end_of_turn>|<start_of_turn>")


@cache
def tokenizer_for(template: str) -> Any:
    """Qwen3's tokenizer with the control tokens that a template writes."""
    tokenizer = load_tokenizer(npm_tokenizer("qwen3"))
    tokens = sorted(set(CONTROL.findall(template)))
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    return tokenizer


def template_for(text: str, **more: Any) -> ChatTemplate:
    return ChatTemplate(tokenizer_for(text), text, **more)


def trained(template: ChatTemplate, messages: Messages, tools: Any = None, kwargs: Any = None) -> list[str]:
    """The trained texts, with the correction of the template that is needed. The whole text is that of transformers."""
    kwargs = kwargs or {}
    while True:
        try:
            rendered = template.render(messages, tools, (), kwargs)
            break
        except CorrectionNeeded as needed:
            template = ChatTemplate(
                template.tokenizer, needed.template, tool_text=needed.tool_template, empty_think=template.empty_think
            )
    (encoded,) = encode(template.tokenizer, [rendered])
    check_against_template(template, Example(messages, tools=tools, template_kwargs=kwargs), encoded)
    ends = np.cumsum(encoded.mask_run_lengths).tolist()
    runs = list(zip([0, *ends], ends, strict=False))
    return [template.tokenizer.decode(encoded.tokens[start:end]) for start, end in runs[1::2]]


def turns(*texts: str) -> Messages:
    """User and assistant texts in turn."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def call(name: str, arguments: Any, id: str = "") -> dict[str, Any]:
    function = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return function | {"id": id} if id else function
