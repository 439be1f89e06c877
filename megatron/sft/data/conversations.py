"""Turns a decoded row of chat data into one conversation: a list of messages with the roles that chat templates know.

Which format a row has is seen from its fields. What is unknown or ambiguous is refused, never guessed.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from megatron.sft.data.sources import json_type
from megatron.sft.errors import UserError

Message = dict[str, str]
Conversation = list[Message]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool", "observation": "tool"}
# Which role may come next; None is the beginning of a conversation.
NEXT_ROLES: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
USED_FIELDS = {
    "messages": ("messages",),
    "sharegpt": ("conversations", "system"),
    "conversations": ("conversations", "system"),
    "instruction": ("instruction", "input", "output", "system"),
}
# Fields that change what a conversation says or what is trained: ignoring them would train something else in silence.
REFUSED_FIELDS = (
    "tools",
    "tool_calls",
    "function_call",
    "functions",
    "history",
    "reasoning_content",
    "loss",
    "weight",
    "train",
)


@dataclass
class RowReader:
    """Makes conversations of rows, renames columns first, and remembers what was seen: formats and ignored fields."""

    renamed_columns: dict[str, str] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    ignored_fields: Counter[str] = field(default_factory=Counter)

    def conversation(self, row: dict[str, Any]) -> Conversation:
        """The conversation of one row. A `UserError` names the field and the fix; the caller adds file and line."""
        row = self._renamed(row)
        row_format = format_of(row)
        refuse_fields(row, "")
        self.formats[row_format] += 1
        for name in row:
            if name not in USED_FIELDS[row_format]:
                self.ignored_fields[name] += 1
        if row_format == "instruction":
            messages = instruction_messages(row)
        else:
            list_name = "messages" if row_format == "messages" else "conversations"
            role_name, text_name = ("from", "value") if row_format == "sharegpt" else ("role", "content")
            messages = listed_messages(row[list_name], list_name, role_name, text_name)
            if row_format != "messages" and optional_text(row, "system"):
                messages.insert(0, {"role": "system", "content": row["system"]})
        check_order(messages)
        return messages

    def _renamed(self, row: dict[str, Any]) -> dict[str, Any]:
        for old, new in self.renamed_columns.items():
            if old not in row:
                raise UserError(f"field {old!r} is missing, which is to be renamed to {new!r}: correct --map-column")
            if new in row:
                raise UserError(
                    f"both {old!r} and {new!r} are there: leave {old!r} out of --map-column, or drop one of them"
                )
        return {self.renamed_columns.get(name, name): value for name, value in row.items()}


def format_of(row: dict[str, Any]) -> str:
    """`messages`, `sharegpt` (conversations of from, value), `conversations` (of role, content) or `instruction`."""
    found: list[str] = [name for name in ("messages", "conversations") if name in row]
    if "instruction" in row or "output" in row:
        found.append("instruction")
    if len(found) > 1:
        raise UserError(f"the row has fields of several formats ({' and '.join(found)}): keep one of them")
    if not found:
        names = ", ".join(map(repr, row)) or "none"
        raise UserError(
            f"fields are {names}; expected 'instruction' and 'output', or 'messages', or 'conversations': "
            "rename columns with MAP_COLUMNS=OLD=NEW (--map-column OLD=NEW)"
        )
    if found[0] != "conversations":
        return found[0]
    turns = row["conversations"]
    first = turns[0] if isinstance(turns, list) and turns else {}
    return "sharegpt" if isinstance(first, dict) and "from" in first else "conversations"


def instruction_messages(row: dict[str, Any]) -> Conversation:
    """Alpaca's rule: `input`, if there is one, follows the instruction on a new line."""
    instruction = required_text(row, "instruction", "")
    output = required_text(row, "output", "")
    extra = optional_text(row, "input")
    system = optional_text(row, "system")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": f"{instruction}\n{extra}" if extra else instruction})
    messages.append({"role": "assistant", "content": output})
    return messages


def listed_messages(turns: Any, list_name: str, role_name: str, text_name: str) -> Conversation:
    """The messages of a list of turns, roles translated. A system text may be empty, any other text may not."""
    if not isinstance(turns, list):
        raise UserError(f"field {list_name!r} is {json_type(turns)}: it must be a list of turns")
    if not turns:
        raise UserError(
            f"field {list_name!r} is an empty list: give at least a user and an assistant turn, or remove the row"
        )
    messages = []
    for index, turn in enumerate(turns):
        where = f"{list_name}[{index}]"
        if not isinstance(turn, dict):
            raise UserError(
                f"{where} is {json_type(turn)}: each turn must be an object with {role_name!r} and {text_name!r}"
            )
        refuse_fields(turn, f"{where}.")
        name = required_text(turn, role_name, f"{where}.")
        role = SHAREGPT_ROLES.get(name) if role_name == "from" else (name if name in ROLES else None)
        if role is None:
            known = ", ".join(SHAREGPT_ROLES if role_name == "from" else ROLES)
            raise UserError(f"{where}.{role_name} is {name!r}, an unknown role: use one of {known}")
        text = optional_text(turn, text_name) if role == "system" else required_text(turn, text_name, f"{where}.")
        messages.append({"role": role, "content": text})
    return messages


def check_order(messages: Conversation) -> None:
    """Refuse orders that no conversation has: two users in a row, a system text in the middle, no last answer."""
    previous: str | None = None
    for index, message in enumerate(messages):
        if message["role"] not in NEXT_ROLES[previous]:
            after = f"follows {previous!r}" if previous else "is the first"
            expected = " or ".join(map(repr, NEXT_ROLES[previous]))
            raise UserError(f"wrong order: turn {index} ({message['role']!r}) {after}, not {expected}: correct the row")
        previous = message["role"]
    if previous != "assistant":
        raise UserError(
            f"the last turn is {previous!r}, so there is no answer to learn: end the row with an assistant turn"
        )


def refuse_fields(fields: dict[str, Any], where: str) -> None:
    for name in REFUSED_FIELDS:
        if fields.get(name) not in (None, [], "", {}):
            raise UserError(
                f"field '{where}{name}' is not supported, and leaving it out would change what is trained: remove it"
            )


def required_text(fields: dict[str, Any], name: str, where: str) -> str:
    if name not in fields:
        raise UserError(f"field '{where}{name}' is missing: add it, or rename a column with MAP_COLUMNS=OLD={name}")
    text = fields[name]
    if not isinstance(text, str):
        raise UserError(f"field '{where}{name}' is {json_type(text)}: it must be text")
    if not text.strip():
        raise UserError(f"field '{where}{name}' is empty: fill it, or remove the row")
    return text


def optional_text(fields: dict[str, Any], name: str) -> str:
    """The text, or an empty one where the field is missing or null."""
    text = fields.get(name)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"field {name!r} is {json_type(text)}: it must be text")
    return text
