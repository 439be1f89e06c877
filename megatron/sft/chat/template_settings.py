"""What a user sets of the chat template: the template, by name or file, its date, and its arguments, such as enable_thinking.

The arguments of one record are given to its rendering; those of all are set in the template's text, so that inference has them
too. The named templates were written for this project to the formats that the families publish.
"""

import json
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from megatron.sft.runtime.errors import UserError

FOLDER = Path(__file__).with_name("templates")
NAMES = ("chatml", "llama-2", "llama-3", "mistral", "qwen", "deepseek-r1")

# What apply_chat_template and templates have under these names is not the data's to choose.
RESERVED = {
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now", "raise_exception", "namespace", "self",
}  # fmt: skip


def chosen_template(name_or_file: str) -> str:
    """The text of a template by its name or file; a `UserError` if it cannot be read or is empty."""
    path = FOLDER / f"{name_or_file}.jinja" if name_or_file in NAMES else Path(name_or_file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"CHAT_TEMPLATE is {name_or_file!r}, neither a name ({', '.join(NAMES)}) nor a readable file ({error}): correct it"
        ) from None
    if not text.strip():
        raise UserError(f"CHAT_TEMPLATE is {name_or_file!r}, an empty file: give a template")
    return text.removesuffix("\n")


def read_date(text: str) -> date | None:
    """The date of TEMPLATE_DATE; None if it is empty."""
    try:
        return date.fromisoformat(text) if text else None
    except ValueError:
        raise UserError(f"TEMPLATE_DATE is {text!r}: give a date such as 2026-11-26") from None


def read_arguments(text: str) -> dict[str, Any]:
    """The arguments of TEMPLATE_KWARGS, a JSON object."""
    try:
        arguments = json.loads(text) if text.strip() else {}
    except json.JSONDecodeError:
        arguments = None
    if not isinstance(arguments, dict):
        raise UserError(f'TEMPLATE_KWARGS is {text!r}: give a JSON object such as {{"enable_thinking": false}}')
    check_arguments(arguments, "TEMPLATE_KWARGS")
    return arguments


def check_arguments(arguments: dict[str, Any], where: str) -> None:
    """A `UserError` for what no template can be given."""
    for name in arguments:
        if not name.isidentifier() or name in RESERVED:
            raise UserError(f"{where} has {name!r}, which is not an argument for a chat template: remove it")


def with_defaults(template: str, arguments: dict[str, Any]) -> str:
    """The template with these values of its arguments where it is not given others; a `UserError` if it uses one of them
    nowhere."""
    unused = unused_arguments(template, arguments) if template else []
    if unused:
        raise UserError(f"TEMPLATE_KWARGS has {unused[0]!r}, which the chat template does not use: correct or remove it")
    # Python's spelling of JSON values is Jinja's as well.
    lines = (
        f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}" for name, value in arguments.items()
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
