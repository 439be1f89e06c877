"""Arguments of a chat template besides messages and functions, such as enable_thinking: of one record, or of all (baked into
the template's text, so that inference has them without being given them)."""

from typing import Any

import jinja2
from jinja2 import meta

from megatron.sft.runtime.errors import UserError

# What apply_chat_template and templates have under these names is not the data's to choose.
RESERVED = {
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now", "raise_exception", "namespace", "self",
}  # fmt: skip


def check_arguments(arguments: dict[str, Any], where: str) -> None:
    """A `UserError` for what no template can be given."""
    for name in arguments:
        if not name.isidentifier() or name in RESERVED:
            raise UserError(f"{where} has {name!r}, which is not an argument for a chat template: remove it")


def with_defaults(template: str, arguments: dict[str, Any]) -> str:
    """The template with these values of its arguments where it is not given others."""
    # Python's spelling of JSON values is Jinja's as well.
    lines = (
        f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}"
        for name, value in arguments.items()
    )
    defaults = "".join(lines)
    return f"{defaults}\n{template}" if defaults and template else template  # the line break after a tag is not printed


def unused_arguments(template: str, arguments: dict[str, Any]) -> list[str]:
    """The names that the template does not ask for."""
    if not arguments:
        return []
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        asked = meta.find_undeclared_variables(_compile_jinja_template(template).environment.parse(template))
    except jinja2.TemplateError:
        return []
    return [name for name in arguments if name not in asked]
