"""Turns a decoded row of chat data into one example: messages with the roles that chat templates know, or plain text.

Which format a row has is seen from its fields. What is unknown or ambiguous is refused, never guessed.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from megatron.sft.chat.fields import optional_text, required_list, required_text
from megatron.sft.chat.tool_calls import tools_of
from megatron.sft.chat.turns import Conversation, Message, Turns, listed_turns
from megatron.sft.runtime.errors import UserError

__all__ = ["Conversation", "Example", "Message", "RowReader", "check_order", "format_of"]

# Which role may come next; None is the beginning of a conversation.
NEXT_ROLES: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
# The fields that say which format a row has, and the others that each format uses.
FORMAT_FIELDS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
    "query": ("query", "response"),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}
MORE_FIELDS = {
    "messages": ("system", "tools"),
    "conversations": ("system", "tools"),
    "instruction": ("input", "system", "history", "tools"),
    "query": ("system", "history", "tools"),
    "prompt": ("system", "tools"),
    "text": (),
}
# Fields that change what a conversation says or what is trained: ignoring them would train something else in silence.
REFUSED_FIELDS = (
    "tools",
    "tool_calls",
    "function_call",
    "functions",
    "history",
    "reasoning_content",
    "images",
    "videos",
    "audios",
)
NOT_A_COLUMN = "-"


@dataclass(frozen=True)
class Example:
    """One row. `trained` says of every message whether its own `loss` field asks for training, None where it has none.

    Either `messages` or `text` (to be learned as it is) is filled.
    """

    messages: Conversation
    trained: tuple[bool | None, ...] = ()
    tools: list[dict[str, Any]] | None = None
    text: str = ""


@dataclass
class RowReader:
    """Makes examples of rows, renames columns first, and remembers what was seen: formats and ignored fields.

    `replaced` are texts that stand for others, such as {{NAME}} in data about the model itself. A column that is renamed
    to "-" is left out.
    """

    renamed_columns: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str | None] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    ignored_fields: Counter[str] = field(default_factory=Counter)

    def conversation(self, row: dict[str, Any]) -> Conversation:
        """The messages of one row of chat data."""
        example = self.example(row)
        if not example.messages:
            raise UserError("the row is plain text: it must be a conversation")
        return example.messages

    def example(self, row: dict[str, Any]) -> Example:
        """The example of one row. A `UserError` names the field and the fix; the caller adds file and line."""
        row = self._renamed(row)
        kind = format_of(row)
        refuse_fields(row, (*FORMAT_FIELDS[kind], *MORE_FIELDS[kind]))
        if kind == "text":
            turns = Turns()
            text = self._replaced(required_text(row, "text", ""), "text")
        else:
            turns, text = turns_of(row, kind), ""
            self._replace_in(turns)
            check_order(turns.messages)
        self._remember(row, kind, turns)
        tools = tools_of(row.get("tools")) if kind != "text" else None
        return Example(turns.messages, tuple(turns.trained), tools, text)

    def _renamed(self, row: dict[str, Any]) -> dict[str, Any]:
        if not self.renamed_columns:
            return row
        for old, new in self.renamed_columns.items():
            if new == NOT_A_COLUMN:
                continue
            if old not in row:
                raise UserError(f"field {old!r} is missing, which is to be renamed to {new!r}: correct MAP_COLUMNS")
            if new in row and self.renamed_columns.get(new) is None:
                raise UserError(
                    f"both {old!r} and {new!r} are there: take {old!r} out of MAP_COLUMNS, or add {new}=- to leave it out"
                )
        renamed = {self.renamed_columns.get(name, name): value for name, value in row.items()}
        renamed.pop(NOT_A_COLUMN, None)
        return renamed

    def _remember(self, row: dict[str, Any], kind: str, turns: Turns) -> None:
        self.formats[format_name(row, kind)] += 1
        used = FORMAT_FIELDS[kind] + MORE_FIELDS[kind]
        for name in row:
            if name not in used:
                self.ignored_fields[name] += 1
        self.ignored_fields.update(turns.ignored_fields)

    def _replace_in(self, turns: Turns) -> None:
        for index, message in enumerate(turns.messages):
            if message["content"] and "{{" in message["content"]:
                message["content"] = self._replaced(message["content"], f"turn {index}")

    def _replaced(self, text: str, where: str) -> str:
        for placeholder, value in self.replaced.items():
            if placeholder in text:
                if value is None:
                    variable = f"MODEL_{placeholder.strip('{}')}"
                    raise UserError(f"{where} has the placeholder {placeholder}: set {variable} to what it stands for")
                text = text.replace(placeholder, value)
        return text


def format_of(row: dict[str, Any]) -> str:
    """The format, a key of FORMAT_FIELDS. A row with fields of several is refused."""
    found = [kind for kind, names in FORMAT_FIELDS.items() if any(row.get(name) is not None for name in names)]
    found = found or [kind for kind, names in FORMAT_FIELDS.items() if any(name in row for name in names)]
    if len(found) > 1:
        columns = [name for kind in found for name in FORMAT_FIELDS[kind] if row.get(name) is not None]
        raise UserError(
            f"the row has fields of several formats ({' and '.join(found)}): leave all but one out, for example with "
            f'MAP_COLUMNS="{columns[-1]}=-"'
        )
    if not found:
        names = ", ".join(map(repr, row)) or "none"
        raise UserError(
            f"fields are {names}; expected 'instruction' and 'output', or 'messages', or 'conversations', or 'query' and "
            "'response', or 'prompt' and 'completion', or 'text': rename columns with MAP_COLUMNS=OLD=NEW (--map-column)"
        )
    return found[0]


def format_name(row: dict[str, Any], kind: str) -> str:
    """How a format is reported."""
    if kind == "instruction":
        return "alpaca" if any(name in row for name in ("input", "history")) else "instruction"
    if kind == "conversations":
        turns = row["conversations"]
        is_sharegpt = isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]
        return "sharegpt" if is_sharegpt else "conversations"
    return {"query": "query/response", "prompt": "prompt/completion"}.get(kind, kind)


def turns_of(row: dict[str, Any], kind: str) -> Turns:
    """The turns of a row, its system text first."""
    if kind in ("messages", "conversations"):
        turns = listed_turns(required_list(row, kind, "turns"), kind)
    elif kind == "prompt" and not isinstance(row.get("prompt"), str):
        turns = prompt_and_completion(row)
    else:
        turns = single_turns(row, *FORMAT_FIELDS[kind])
    system = optional_text(row, "system")
    if system and turns.messages[0]["role"] == "system":
        raise UserError(f"the row has a field 'system' and a system turn in {kind!r}: keep one of them")
    if system:
        turns.insert_system(system)
    return turns


def single_turns(row: dict[str, Any], question_name: str, answer_name: str) -> Turns:
    """History pairs, then one question and its answer. Alpaca's rule: `input` follows the instruction on a new line."""
    question = required_text(row, question_name, "")
    answer = required_text(row, answer_name, "")
    extra = optional_text(row, "input") if question_name == "instruction" else ""
    turns = Turns()
    pairs = row.get("history")
    for index, pair in enumerate(required_list(row, "history", "pairs") if pairs not in (None, "", []) else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"history[{index}] is no pair of two texts: write [question, answer]")
        texts = {"0": pair[0], "1": pair[1]}
        turns.add({"role": "user", "content": required_text(texts, "0", f"history[{index}].")})
        turns.add({"role": "assistant", "content": required_text(texts, "1", f"history[{index}].")})
    turns.add({"role": "user", "content": f"{question}\n{extra}" if extra else question})
    turns.add({"role": "assistant", "content": answer})
    return turns


def prompt_and_completion(row: dict[str, Any]) -> Turns:
    """Two lists of messages, of which the second is what is to be learned."""
    for name in ("prompt", "completion"):
        if name not in row:
            raise UserError(f"field {name!r} is missing: add it, or rename a column with MAP_COLUMNS=OLD={name}")
    prompt = listed_turns(required_list(row, "prompt", "turns, as 'completion' is"), "prompt")
    completion = listed_turns(required_list(row, "completion", "turns, as 'prompt' is"), "completion")
    prompt.trained = [False if trained is None else trained for trained in prompt.trained]
    prompt.extend(completion)
    return prompt


def check_order(messages: Conversation) -> None:
    """Refuse orders that no conversation has: two users in a row, a system text in the middle, no last answer."""
    previous: str | None = None
    for index, message in enumerate(messages):
        if message["role"] not in NEXT_ROLES[previous]:
            after = f"follows {previous!r}" if previous else "is the first"
            expected = " or ".join(map(repr, NEXT_ROLES[previous]))
            raise UserError(f"wrong order: turn {index} ({message['role']!r}) {after}, not {expected}: correct the row")
        if message["role"] == "user" and index and messages[index - 1].get("tool_calls"):
            raise UserError(f"wrong order: turn {index} ('user') follows a call without its result: add a 'tool' turn")
        previous = message["role"]
    if previous != "assistant":
        raise UserError(
            f"the last turn is {previous!r}, so there is no answer to learn: end the row with an assistant turn"
        )


def refuse_fields(row: dict[str, Any], used: tuple[str, ...]) -> None:
    for name in REFUSED_FIELDS:
        if name not in used and row.get(name) not in (None, [], "", {}):
            raise UserError(
                f"field {name!r} is not supported, and leaving it out would change what is trained: remove it"
            )
