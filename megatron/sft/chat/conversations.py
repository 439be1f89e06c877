"""Reads one record of chat data: the messages of its conversation, or plain text.

The format is recognized by the record's fields. What is unknown or ambiguous is refused, never guessed.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from megatron.sft.chat.fields import checked_list, optional_text, refuse_fields, required_text
from megatron.sft.chat.turns import Message, Messages, Tools, Turns, read_tools, read_turns
from megatron.sft.runtime import exact_json
from megatron.sft.runtime.errors import UserError

__all__ = ["Example", "Message", "Messages", "RecordReader", "group_hash", "join_rounds"]

# Which role may come next; None is the beginning of a conversation.
NEXT_ROLES: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
# The fields by which each format is recognized, and the others that it uses.
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
# Fields that change what a conversation says or what is trained: ignoring them would silently train something else.
REFUSED_FIELDS = [
    "tools",
    "tool_calls",
    "function_call",
    "functions",
    "history",
    "reasoning_content",
    "images",
    "videos",
    "audios",
]
NOT_A_COLUMN = "-"


@dataclass(frozen=True)
class Example:
    """One record: either `messages` or `text` (to be learned as it is) is filled.

    `loss_flags` has for every message what its own `loss` field says, None where it has none.
    """

    messages: Messages
    loss_flags: tuple[bool | None, ...] = ()
    tools: Tools = None
    text: str = ""

    def rounds(self) -> "list[Example]":
        """An example for every user message with the turns up to the next, each with the system text and the functions."""
        starts = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        spans = [[*range(starts[0]), *range(start, end)] for start, end in pairwise([*starts, len(self.messages)])]
        return [
            replace(
                self,
                messages=[self.messages[index] for index in span],
                loss_flags=tuple(self.loss_flags[index] for index in span),
            )
            for span in spans
        ]


def join_rounds(rounds: Sequence[Example]) -> Example:
    """Consecutive rounds of one example, with its system text once."""
    num_system = next(index for index, message in enumerate(rounds[0].messages) if message["role"] == "user")
    messages, flags = rounds[0].messages[:num_system], rounds[0].loss_flags[:num_system]
    for example in rounds:
        messages = messages + example.messages[num_system:]
        flags += example.loss_flags[num_system:]
    return replace(rounds[0], messages=messages, loss_flags=flags)


def group_hash(record: dict[str, Any], key: str, renamed_columns: dict[str, str]) -> int | None:
    """A 64-bit hash of the record's field `key` (GROUP_KEY), as named in the file or as renamed (old name to new); None
    if the field is empty. Among a million values the chance that any two share a hash is 3 in 100 million."""
    old_names = {new: old for old, new in renamed_columns.items()}
    value = record.get(key, record.get(old_names.get(key, key)))
    if value in (None, "", [], {}):
        return None
    content = exact_json.dumps(value, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


@dataclass
class RecordReader:
    """Makes examples of records, and counts their formats and the fields that were ignored.

    `renamed_columns` maps old names to new; "-" removes a column. `replaced` maps placeholders such as {{NAME}} to their
    texts, None where the user has set none.
    """

    renamed_columns: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str | None] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    ignored_fields: Counter[str] = field(default_factory=Counter)

    def conversation(self, record: dict[str, Any]) -> Messages:
        """The messages of one record. A `UserError` refuses plain text."""
        example = self.example(record)
        if not example.messages:
            raise UserError("the record is plain text: it must be a conversation")
        return example.messages

    def example(self, record: dict[str, Any]) -> Example:
        """The example of one record. A `UserError` names the field and the fix; the caller adds file and line."""
        record = self._renamed(record)
        kind = _format_of(record)
        used = (*FORMAT_FIELDS[kind], *MORE_FIELDS[kind])
        refuse_fields(record, [name for name in REFUSED_FIELDS if name not in used])
        turns, text = Turns(), ""
        if kind == "text":
            text = self._filled(required_text(record, "text"), "text")
        else:
            turns = _turns_of(record, kind)
            for index, message in enumerate(turns.messages):
                message["content"] = self._filled(message["content"], f"turn {index}")
            _check_order(turns.messages)
        self.formats[_format_name(record, kind)] += 1
        self.ignored_fields.update(name for name in record if name not in used)
        self.ignored_fields.update(turns.ignored_fields)
        tools = read_tools(record.get("tools")) if kind != "text" else None
        return Example(turns.messages, tuple(turns.loss_flags), tools, text)

    def _renamed(self, record: dict[str, Any]) -> dict[str, Any]:
        if not self.renamed_columns:
            return record
        for old, new in self.renamed_columns.items():
            if new == NOT_A_COLUMN:
                continue
            if old not in record:
                raise UserError(f"field {old!r} is missing, which MAP_COLUMNS renames to {new!r}: correct MAP_COLUMNS")
            if new in record and self.renamed_columns.get(new) is None:
                raise UserError(
                    f"the record has both {old!r} and {new!r}: remove {old!r} from MAP_COLUMNS, or add {new}=- to skip it"
                )
        renamed = {self.renamed_columns.get(name, name): value for name, value in record.items()}
        renamed.pop(NOT_A_COLUMN, None)
        return renamed

    def _filled(self, text: str, where: str) -> str:
        """The text with the placeholders replaced."""
        for placeholder, value in self.replaced.items():
            if placeholder in text:
                if value is None:
                    variable = f"MODEL_{placeholder.strip('{}')}"
                    raise UserError(f"{where} has the placeholder {placeholder}: set {variable} to what it stands for")
                text = text.replace(placeholder, value)
        return text


def _format_of(record: dict[str, Any]) -> str:
    """The format, a key of FORMAT_FIELDS. A record with fields of several formats is refused."""
    found = [kind for kind, names in FORMAT_FIELDS.items() if any(record.get(name) is not None for name in names)]
    found = found or [kind for kind, names in FORMAT_FIELDS.items() if any(name in record for name in names)]
    if len(found) > 1:
        columns = [name for kind in found for name in FORMAT_FIELDS[kind] if record.get(name) is not None]
        raise UserError(
            f"the record has fields of several formats ({' and '.join(found)}): keep one of them, for example with "
            f'MAP_COLUMNS="{columns[-1]}=-"'
        )
    if not found:
        names = ", ".join(map(repr, record)) or "none"
        raise UserError(
            f"fields are {names}; expected 'instruction' and 'output', or 'messages', or 'conversations', or 'query' and "
            "'response', or 'prompt' and 'completion', or 'text': rename columns with MAP_COLUMNS=OLD=NEW (--map-column)"
        )
    return found[0]


def _format_name(record: dict[str, Any], kind: str) -> str:
    """How a format is reported."""
    if kind == "instruction":
        return "alpaca" if any(name in record for name in ("input", "history")) else "instruction"
    if kind == "conversations":
        turns = record["conversations"]
        is_sharegpt = isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]
        return "sharegpt" if is_sharegpt else "conversations"
    return {"query": "query/response", "prompt": "prompt/completion"}.get(kind, kind)


def _turns_of(record: dict[str, Any], kind: str) -> Turns:
    """The turns of a record, its system text first."""
    if kind in ("messages", "conversations"):
        turns = read_turns(checked_list(record[kind], kind, "turns"), kind)
    elif kind == "prompt" and not isinstance(record.get("prompt"), str):
        turns = _prompt_and_completion(record)
    else:
        turns = _question_and_answer(record, *FORMAT_FIELDS[kind])
    system = optional_text(record, "system")
    if system and turns.messages[0]["role"] == "system":
        raise UserError(f"the record has a field 'system' and a system turn in {kind!r}: keep one of them")
    if system:
        first = Turns()
        first.add({"role": "system", "content": system})
        return first + turns
    return turns


def _question_and_answer(record: dict[str, Any], question_name: str, answer_name: str) -> Turns:
    """The pairs of `history`, then one question and its answer. Alpaca's rule: `input` follows on a new line."""
    question = required_text(record, question_name)
    answer = required_text(record, answer_name)
    extra = optional_text(record, "input") if question_name == "instruction" else ""
    pairs = checked_list(record.get("history"), "history", "pairs", or_none=True)
    turns = Turns()
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"history[{index}] is not a pair of strings: write [question, answer]")
        texts = {"0": pair[0], "1": pair[1]}
        turns.add({"role": "user", "content": required_text(texts, "0", f"history[{index}].")})
        turns.add({"role": "assistant", "content": required_text(texts, "1", f"history[{index}].")})
    turns.add({"role": "user", "content": f"{question}\n{extra}" if extra else question})
    turns.add({"role": "assistant", "content": answer})
    return turns


def _prompt_and_completion(record: dict[str, Any]) -> Turns:
    """Two lists of messages: in `prompt` answers are trained only where they ask for it, in `completion` as usual."""
    for name in ("prompt", "completion"):
        if name not in record:
            raise UserError(f"field {name!r} is missing: add it, or rename a column with MAP_COLUMNS=OLD={name}")
    prompt = read_turns(checked_list(record["prompt"], "prompt", "turns, as 'completion' is"), "prompt")
    completion = read_turns(checked_list(record["completion"], "completion", "turns, as 'prompt' is"), "completion")
    prompt.loss_flags = [bool(flag) for flag in prompt.loss_flags]
    return prompt + completion


def _check_order(messages: Messages) -> None:
    """Refuse two users in a row, a system text in the middle, a call without its result, or no last answer."""
    previous: str | None = None
    for index, message in enumerate(messages):
        if message["role"] not in NEXT_ROLES[previous]:
            after = f"follows {previous!r}" if previous else "is the first"
            expected = " or ".join(map(repr, NEXT_ROLES[previous]))
            raise UserError(
                f"wrong order: turn {index} ({message['role']!r}) {after}, not {expected}: correct the record"
            )
        if message["role"] == "user" and index and messages[index - 1].get("tool_calls"):
            raise UserError(f"wrong order: turn {index} ('user') follows a call without its result: add a 'tool' turn")
        previous = message["role"]
    if previous != "assistant":
        raise UserError(
            f"the last turn is {previous!r}, so there is no answer to learn: end the record with an assistant turn"
        )
