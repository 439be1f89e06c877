"""Chat templates by name: written for this project to the formats that the families publish."""

from pathlib import Path

from megatron.sft.runtime.errors import UserError

FOLDER = Path(__file__).with_name("templates")
NAMES = ("chatml", "llama-2", "llama-3", "mistral", "qwen", "deepseek-r1")


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
