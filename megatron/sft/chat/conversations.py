"""Reads one record of chat data: the messages of its conversation, or of both of a preference record, or plain text.

The format is recognized by the record's fields. What is unknown or ambiguous is refused, never guessed.
"""

import contextlib
import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from megatron.sft.chat.example import Example, join_rounds
from megatron.sft.chat.field_names import (
    MEDIA_FIELDS,
    REASONING_FIELDS,
    RECORD_LOSS_FIELDS,
    is_metadata,
    is_of_preferences,
    role_of,
)
from megatron.sft.chat.fields import (
    NOT_A_COLUMN,
    checked_object,
    is_filled,
    refuse_fields,
    renamed,
    renamed_columns,
    required_text,
)
from megatron.sft.chat.formats import ANSWERS, LISTS, PAIRS, TEXT, format_fields, format_name, turns_of, used_fields
from megatron.sft.chat.preferences import (
    SIDE_NAMES,
    Pair,
    chosen_scored_lower,
    prompt_length,
    read_sides,
    side_fields,
    side_flags,
    with_fields_of_input,
)
from megatron.sft.chat.turns import Message, Messages, Turns, read_turns
from megatron.sft.runtime import exact_json
from megatron.sft.runtime.errors import UserError

__all__ = ["Example", "Message", "Messages", "Pair", "RecordReader", "group_hash", "join_rounds", "renamed_columns"]

# Fields that change what a conversation says or what is trained, with every setting.
REFUSED_FIELDS = {"tools", "functions", "tool_calls", "function_call", "history", *REASONING_FIELDS, *MEDIA_FIELDS}
FORMAT_FIELDS = {*LISTS, *PAIRS, *ANSWERS, TEXT}
JUDGEMENTS = ("label", "kto_tag")
# Arguments of apply_chat_template that a template has no variable for.
RESERVED_KWARGS = {
    *("tools", "documents", "messages", "conversation", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}


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
    """Makes examples of records, and counts their formats, the fields that were ignored, and the placeholders.

    `renamed_columns` maps old names to new; "-" removes a column. `replaced` maps placeholders such as {{NAME}} to their
    texts, None where the user has set none. `ignores_unknown`: fields that could say what is said or trained are ignored,
    and do not stop the run. `also_used`: fields that are read elsewhere. Without `needs_answer` a record may be a question.
    """

    renamed_columns: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str | None] = field(default_factory=dict)
    ignores_unknown: bool = False
    also_used: frozenset[str] = frozenset()
    needs_answer: bool = True
    formats: Counter[str] = field(default_factory=Counter)
    ignored_fields: Counter[str] = field(default_factory=Counter)
    placeholders: Counter[str] = field(default_factory=Counter)  # records by placeholder as written, such as {{ name }}

    def __post_init__(self) -> None:
        self._patterns = {
            placeholder: re.compile(r"\{\{\s*" + placeholder.strip("{}") + r"\s*\}\}", re.IGNORECASE)
            for placeholder in self.replaced
        }

    def conversation(self, record: dict[str, Any]) -> Messages:
        """The messages of one record, with the chosen answer of a preference record. A `UserError` refuses plain text."""
        example = self.read(record)
        if isinstance(example, Pair):
            example = example.chosen
        if not example.messages:
            raise UserError("the record is plain text: it must be a conversation")
        return example.messages

    def example(self, record: dict[str, Any]) -> Example:
        """The example of one record. A `UserError` names the field and the fix; the caller adds file and line."""
        record = renamed(self._with_own_input(record), self.renamed_columns)
        _refuse_preferences(record, "of which only one answer can be read here")
        return self._example(record)

    def read(self, record: dict[str, Any]) -> Example | Pair:
        """The example of one record, or both conversations of a preference record; errors as of `example`."""
        record = renamed(self._with_own_input(record), self.renamed_columns)
        if not SIDE_NAMES.isdisjoint(record) and (names := side_fields(record)):
            return self._pair(record, names)
        _refuse_preferences(record, "by names that are not known")
        return self._example(record)

    def _example(self, record: dict[str, Any]) -> Example:
        fields = format_fields(record)
        used = used_fields(record, fields)
        refuse_fields(record, [name for name in record if name in REFUSED_FIELDS and name not in used])
        _check_record_loss(record)
        turns, text = Turns(), ""
        if fields == (TEXT,):
            text = self._filled(required_text(record, TEXT), TEXT)
        else:
            _refuse_empty_list(record, fields)
            turns = turns_of(record, fields, self.needs_answer)
            self._fill(turns.messages)
            if self.needs_answer:
                _check_answers(turns.messages)
        unused = [(name, name, record[name]) for name in record if name not in used]
        self._ignore([*unused, *turns.extras], record, fields, [turns.messages])
        self.formats[format_name(record, fields)] += 1
        kwargs = _template_kwargs(record) if text == "" else {}
        return Example(turns.messages, tuple(turns.loss_flags), turns.tools, text, kwargs)

    def _pair(self, record: dict[str, Any], names: tuple[str, str]) -> Pair:
        sides = read_sides(record, names)
        both = (sides.chosen, sides.rejected)
        refuse_fields(record, [name for name in record if name in REFUSED_FIELDS and name not in sides.used])
        _check_record_loss(record)
        for turns in both:
            self._fill(turns.messages)
        num_prompt = prompt_length(sides.chosen.messages, sides.rejected.messages, sides)
        extras = [(name, name, record[name]) for name in record if name not in sides.used]
        extras += [extra for turns in both for extra in turns.extras]
        self._ignore(extras, record, sides.fields, [turns.messages for turns in both])
        self.formats["/".join(sides.fields)] += 1
        kwargs = _template_kwargs(record)
        chosen, rejected = (
            Example(turns.messages, side_flags(turns.loss_flags, num_prompt, name), turns.tools, "", kwargs)
            for turns, name in zip(both, sides.names, strict=True)
        )
        return Pair(chosen, rejected, num_prompt, chosen_scored_lower(record))

    def _ignore(
        self, extras: list[tuple[str, str, Any]], record: dict[str, Any], fields: tuple[str, ...], conversations: list[Messages]
    ) -> None:
        """Count these fields, if they say nothing more than the conversation; else refuse them."""
        for path, name, value in extras:
            if is_filled(value) and not self._says_nothing(path, name, value, record, conversations):
                if path in FORMAT_FIELDS:
                    raise UserError(
                        f"the record has fields of several formats ({fields[0]} and {path}): keep one of them, for example "
                        f'with MAP_COLUMNS="{path}=-"'
                    )
                if not self.ignores_unknown:
                    raise _unknown(path, value)
        self.ignored_fields.update({path for path, _, _ in extras})

    def _says_nothing(self, path: str, name: str, value: Any, record: dict[str, Any], conversations: list[Messages]) -> bool:
        if path in self.also_used or path in RECORD_LOSS_FIELDS or is_metadata(name, value, record):
            return True
        if path == "mask":  # NeMo: the role whose turns are not trained
            return isinstance(value, str) and role_of(value) not in (None, "assistant")
        return any(_is_repeated(path, value, messages) for messages in conversations)

    def _with_own_input(self, record: dict[str, Any]) -> dict[str, Any]:
        is_pair = not SIDE_NAMES.isdisjoint(record) or not SIDE_NAMES.isdisjoint(self.renamed_columns.values())
        return with_fields_of_input(record) if is_pair else record

    def _fill(self, messages: Messages) -> None:
        for index, message in enumerate(messages):
            message["content"] = self._filled(message["content"], f"turn {index}")

    def _filled(self, text: str, where: str) -> str:
        """The text with the placeholders replaced. In small letters or with spaces, as in {{ name }}, they may also be meant
        for other programs, so without a value they stay."""
        if "{{" not in text:
            return text
        for placeholder, value in self.replaced.items():
            if value is None and placeholder in text:
                variable = f"MODEL_{placeholder.strip('{}')}"
                raise UserError(f"{where} has the placeholder {placeholder}: set {variable} to what it stands for")
            pattern = self._patterns[placeholder]
            self.placeholders.update(set(pattern.findall(text)))
            if value is not None:
                text = pattern.sub(value.replace("\\", r"\\"), text)
        return text


def _refuse_preferences(record: dict[str, Any], why: str) -> None:
    """Refuse fields of preference data, with the MAP_COLUMNS that makes a record of them that is read."""
    found = [name for name in record if is_of_preferences(name) and is_filled(record[name])]
    found = [name for name in found if not is_metadata(name, record[name], record)]
    if not found:
        return
    chosen = next((name for name in found if "rejected" not in name and "non" not in name), "")
    new = "messages" if isinstance(record.get(chosen), list) else "completion"
    tried = [{name: new if name == chosen else NOT_A_COLUMN for name in found}, dict.fromkeys(found, NOT_A_COLUMN)]
    if chosen and len(found) == 2 and SIDE_NAMES.isdisjoint(found):
        tried.insert(0, {name: "chosen" if name == chosen else "rejected" for name in found})
    advice = "write the answer that is to be learned as an answer"
    for columns in tried:
        with contextlib.suppress(UserError):
            RecordReader(columns, ignores_unknown=True).read(record)
            listed = " ".join(f"{old}={new}" for old, new in columns.items())
            advice = f'rename its columns, for example with MAP_COLUMNS="{listed}"'
            break
    raise UserError(f"field {found[0]!r} is of preference data (a chosen and a rejected answer), {why}: {advice}")


def _check_record_loss(record: dict[str, Any]) -> None:
    for name in record:
        if name in RECORD_LOSS_FIELDS and record[name] not in (None, 1):
            raise UserError(
                f"field {name!r} is {record[name]!r}, which says how much of the record is trained: only 1 is supported; "
                f'remove the record, or drop the field with MAP_COLUMNS="{name}=-"'
            )


def _refuse_empty_list(record: dict[str, Any], fields: tuple[str, ...]) -> None:
    """An empty list next to the fields of another format."""
    others = [name for name in record if name in FORMAT_FIELDS and name not in fields and is_filled(record[name])]
    if fields[0] in LISTS and not is_filled(record[fields[0]]) and others:
        raise UserError(
            f"the record has fields of several formats ({fields[0]} and {others[0]}), of which {fields[0]!r} is empty: keep "
            f'one of them, for example with MAP_COLUMNS="{fields[0]}=-"'
        )


def _check_answers(messages: Messages) -> None:
    """An answer is learned after something that it answers; the order of turns is the chat template's matter."""
    if not any(message["role"] == "assistant" for message in messages[1:]):
        last = f"the last turn is {messages[-1]['role']!r} and none is an assistant turn"
        first = "turn 0 ('assistant') is the first and the only answer"
        what = first if messages[0]["role"] == "assistant" else last
        raise UserError(f"{what}, so there is no answer to learn: add an assistant turn, or remove the record")


def _is_repeated(path: str, value: Any, messages: Messages) -> bool:
    """Whether a field has only what the conversation has: a text of it, the same turns, or the whole rendered."""
    texts = [message["content"] for message in messages if message["content"]]
    if isinstance(value, str):
        text = value.strip()
        if any(text in content for content in texts):
            return True
        # A rendered conversation (`text`), or its prompt.
        asked = [message["content"] for message in messages if message["role"] == "user"]
        rendered = asked if path == "prompt" else texts
        return path in (TEXT, "prompt") and bool(rendered) and all(content.strip() in value for content in rendered)
    if path in (*LISTS, "prompt") and isinstance(value, list):
        try:
            repeated = read_turns(value, path)
        except UserError:
            return False
        says_more = any(is_filled(item) and not is_metadata(name, item, ()) for _, name, item in repeated.extras)
        return not says_more and all(message in messages for message in repeated.messages)
    return False


def _unknown(path: str, value: Any) -> UserError:
    shown = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}..."
    drop = f'MAP_COLUMNS="{path}=-", or ignore all unknown fields with UNKNOWN_FIELDS=ignore'
    if path in JUDGEMENTS:
        return UserError(
            f"field {path!r} ({shown}) judges one answer, as KTO's data does, which is not supported: make pairs of a good and "
            f"a bad answer to one question, or keep the records with good answers alone and drop the field with {drop}"
        )
    return UserError(
        f"field {path!r} ({shown}) is unknown, and could say what is said or trained: rename it or drop it with {drop}"
    )


def _template_kwargs(record: dict[str, Any]) -> dict[str, Any]:
    """The arguments for the chat template of a record: `chat_template_kwargs`, and `enable_thinking` (verl)."""
    value = record.get("chat_template_kwargs")
    kwargs = dict(checked_object(value, "chat_template_kwargs", or_text=True)) if is_filled(value) else {}
    kwargs = {name: argument for name, argument in kwargs.items() if argument is not None}
    for name in kwargs:
        if name in RESERVED_KWARGS:
            raise UserError(f"field 'chat_template_kwargs.{name}' is not for a chat template: remove it")
    thinking = record.get("enable_thinking")
    if thinking is not None:
        if not isinstance(thinking, bool) or kwargs.get("enable_thinking", thinking) != thinking:
            raise UserError(f"field 'enable_thinking' is {thinking!r}: give true or false, the same as in chat_template_kwargs")
        kwargs["enable_thinking"] = thinking
    return kwargs
