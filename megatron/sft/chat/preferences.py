"""Reads a preference record: one prompt and two answers, of which one is preferred (chosen) to the other (rejected).

    chosen and rejected are whole conversations       the turns that both begin with are the prompt (TRL's implicit prompt)
    they are answers: texts, turns or lists of turns  the prompt is in other fields, as it is next to a single answer
    only the rejected answer is apart (ms-swift)      the chosen one is what follows the last question of the conversation

Each side becomes an ordinary conversation. Of these only what follows the prompt is trained, as in TRL's DPOTrainer.
"""

import contextlib
import re
from dataclasses import dataclass, replace
from typing import Any

from megatron.sft.chat.example import Example
from megatron.sft.chat.fields import is_filled, json_type, parsed_json, required_text
from megatron.sft.chat.formats import (
    ANSWERS,
    CONTEXTS,
    LISTS,
    OTHER_QUESTIONS,
    PAIRS,
    TEXT,
    format_fields,
    given_turns,
    named,
    question_turns,
    turns_of,
    used_fields,
    with_record_fields,
)
from megatron.sft.chat.turns import Messages, Turns, read_turns
from megatron.sft.runtime.errors import UserError

# Of TRL and most others, OpenAI, Argilla. Any name of a chosen side goes with any name of a rejected one.
CHOSEN = ("chosen", "preferred_output", "chosen_response")
REJECTED = ("rejected", "non_preferred_output", "rejected_response", "rejected_messages")
# These may be alone, next to a conversation with the chosen answer (ms-swift).
WHOLE_ALONE = "rejected_messages"
ALONE = ("rejected_response", WHOLE_ALONE)
SIDE_NAMES = {*CHOSEN, *REJECTED}
# Numbers next to the sides, by which these were chosen: `score_chosen` of UltraFeedback, `chosen_rating` of Argilla.
SCORE_OF_CHOSEN = re.compile(r"(.*_)?(chosen_(score|rating|reward)|(score|rating|reward)_chosen)")
# A whole conversation as one text, as hh-rlhf has it.
DIALOGUE = re.compile(r"\s*(human|user)\s*:.*\n\s*assistant\s*:", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Pair:
    """Two conversations of one record. They begin with the same `num_prompt` messages, of which nothing is trained.

    scored_lower: the record gives its chosen answer a lower score than its rejected one.
    """

    chosen: Example
    rejected: Example
    num_prompt: int
    scored_lower: bool = False


@dataclass(frozen=True)
class Sides:
    """Both conversations as they were read.

    fields: of the record, which hold them. names: the two of these by which messages call the sides. used: all fields that
    were read. num_prompt: the turns that the record gives as a prompt; None if the prompt is what both sides begin with.
    """

    fields: tuple[str, ...]
    names: tuple[str, str]
    used: set[str]
    chosen: Turns
    rejected: Turns
    num_prompt: int | None = None


def side_fields(record: dict[str, Any]) -> tuple[str, str] | None:
    """The fields of the chosen and of the rejected side, the first empty if the chosen one is the record's own answer; None
    if the record is not of preferences. A side that is missing is a `UserError`. record: has one of SIDE_NAMES."""
    chosen, rejected = ([name for name in names if is_filled(record.get(name))] for names in (CHOSEN, REJECTED))
    if not chosen and not rejected and any(is_filled(record.get(name)) for name in (*LISTS, *ANSWERS, TEXT)):
        return None  # in a table each record has the fields of all others
    for found in (chosen, rejected):
        if len(found) > 1:
            raise UserError(f'the record has both {found[0]!r} and {found[1]!r}: drop one, MAP_COLUMNS="{found[1]}=-"')
    if rejected and not chosen and rejected[0] in ALONE:
        return "", rejected[0]
    for names, found in ((CHOSEN, chosen), (REJECTED, rejected)):
        if not found:
            empty = next((name for name in names if name in record), "")
            fix = "is empty: fill it" if empty else f"is missing: add it, rename a column with MAP_COLUMNS=OLD={names[0]}"
            raise UserError(f"field {empty or names[0]!r} {fix}, or remove the record: a pair has a chosen and a rejected side")
    return chosen[0], rejected[0]


def with_fields_of_input(record: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's preference records have messages and functions of the prompt in `input`: the record with these as its own."""
    given = record.get("input")
    if isinstance(given, str) and given.lstrip()[:1] == "{":
        with contextlib.suppress(UserError):
            given = parsed_json(given, "input")
    if not isinstance(given, dict) or "messages" not in given:
        return record
    rest = {name: value for name, value in record.items() if name != "input"}
    for name in given:
        if name in rest:
            raise UserError(f"the record has both {name!r} and 'input.{name}': keep one of them")
    return rest | given


def read_sides(record: dict[str, Any], names: tuple[str, str]) -> Sides:
    """The two conversations of a record, whose sides are in the fields `names`."""
    if not names[0]:
        return _sides_of_conversation(record, names[1])
    chosen, rejected = (_side(record, name) for name in names)
    if _is_answer(chosen) != _is_answer(rejected):
        name, side = (names[1], rejected) if _is_answer(chosen) else (names[0], chosen)
        raise UserError(
            f"{name!r} is a whole conversation, which begins with a turn of role {side.messages[0]['role']!r}, and the other "
            "side only an answer: write both alike"
        )
    prompt_name = _prompt_field(record, names) if _is_answer(chosen) else ""
    used = used_fields(record, (prompt_name or names[0], *names))
    if not prompt_name:
        chosen, rejected = with_record_fields(record, chosen, names[0]), with_record_fields(record, rejected, names[1])
        return Sides(names, names, used, chosen, rejected)
    listed = given_turns(record[prompt_name])
    if listed is None:
        prompt = question_turns(record, prompt_name)
        used |= {"history", *(CONTEXTS if prompt_name == "instruction" else ())}
    else:
        prompt = read_turns(listed, prompt_name)
    prompt = with_record_fields(record, prompt, prompt_name)
    for name, side in zip(names, (chosen, rejected), strict=True):
        if prompt.messages[-1] == side.messages[0]:
            raise UserError(f"{prompt_name!r} ends with the answer of {name!r}: it must end before that, as a prompt does")
    return Sides((prompt_name, *names), names, used, prompt + chosen, prompt + rejected, len(prompt.messages))


def prompt_length(chosen: Messages, rejected: Messages, sides: Sides) -> int:
    """The number of messages of the prompt; a `UserError` where no answers to one prompt follow it, or equal ones."""
    if sides.chosen.tools != sides.rejected.tools:
        raise UserError("the two sides name other functions, but a pair has one prompt: give both the same")
    if chosen == rejected:
        raise UserError(f"{' and '.join(map(repr, sides.names))} are equal, so neither is preferred: remove the record")
    num_prompt = sides.num_prompt
    if num_prompt is None:
        differ = (one != other for one, other in zip(chosen, rejected, strict=False))
        num_prompt = next((index for index, differs in enumerate(differ) if differs), min(len(chosen), len(rejected)))
    for name, messages in zip(sides.names, (chosen, rejected), strict=True):
        if num_prompt == len(messages):
            raise UserError(f"{name!r} has nothing after the {num_prompt} turns with which both sides begin: add its answer")
        role = messages[num_prompt]["role"]
        if role != "assistant" or not num_prompt:
            raise UserError(
                f"the sides differ from turn {num_prompt} on, which in {name!r} is of role {role!r}: they must begin with one "
                "prompt and then have an answer each; correct the record, or give the prompt in a field 'prompt'"
            )
    return num_prompt


def chosen_scored_lower(record: dict[str, Any]) -> bool:
    """Whether the record has a score of its chosen side that is below the rejected side's."""
    for name, score in record.items():
        other = record.get(name.replace("chosen", "rejected"))
        if SCORE_OF_CHOSEN.fullmatch(name) and all(type(each) in (int, float) for each in (score, other)) and score < other:
            return True
    return False


def side_flags(flags: list[bool | None], num_prompt: int, name: str) -> tuple[bool | None, ...]:
    """What the turns of a side say of their training (see `Turns`), those of the prompt that they are not trained."""
    if True in flags[:num_prompt]:
        raise UserError(
            f"turn {flags.index(True)} of {name!r} is to be trained (loss, train or weight is 1), but is in the prompt, and of "
            "a pair only what follows the prompt is trained: drop that field with MAP_COLUMNS"
        )
    return (False,) * num_prompt + tuple(flags[num_prompt:])


def _is_answer(side: Turns) -> bool:
    return bool(side.messages[0]["role"] == "assistant")


def _side(record: dict[str, Any], name: str) -> Turns:
    """The turns of a side: a text, one turn, or a list of turns."""
    listed = given_turns(record[name])
    if listed is not None:
        return read_turns(listed, name)
    if not isinstance(record[name], str):
        raise UserError(f"field {name!r} is {json_type(record[name])}: it must be an answer's text, a turn, or a list of turns")
    turns = Turns()
    turns.add({"role": "assistant", "content": required_text(record, name)})
    return turns


def _prompt_field(record: dict[str, Any], names: tuple[str, str]) -> str:
    """The field with the prompt of two answers; empty if these are turns, which may be whole conversations that begin with
    an answer."""
    filled = {name: value for name, value in record.items() if name not in SIDE_NAMES and is_filled(value)}
    for name in ("prompt", *LISTS, *PAIRS):
        if name in filled and (name not in LISTS or given_turns(filled[name]) is not None):
            return name
    side = record[names[0]]
    if given_turns(side) is not None:
        return ""
    if DIALOGUE.match(side):
        raise UserError(
            f"field {names[0]!r} is a whole conversation in one text (Human: ... Assistant: ...), where turns and quotations "
            "look alike: write it as a list of turns with 'role' and 'content'"
        )
    other = named(filled, OTHER_QUESTIONS) or next((name for name, value in filled.items() if given_turns(value)), "OLD")
    raise UserError(
        f"{names[0]!r} and {names[1]!r} are answers without a prompt: add 'prompt', 'question', 'instruction' or 'messages', "
        f'or rename a column, here perhaps with MAP_COLUMNS="{other}=prompt"'
    )


def _sides_of_conversation(record: dict[str, Any], name: str) -> Sides:
    """A conversation with the chosen answer, and apart from it the rejected answer, or the whole conversation with that."""
    rest = {field: value for field, value in record.items() if field not in SIDE_NAMES}
    fields = format_fields(rest)
    if fields == (TEXT,):
        raise UserError(f"{name!r} is next to a plain text, in which there is no answer: drop either with MAP_COLUMNS")
    names, used = (fields[-1], name), used_fields(rest, fields) | {name}
    chosen, rejected = turns_of(rest, fields, needs_answer=True), _side(record, name)
    if name == WHOLE_ALONE:
        return Sides((*fields, name), names, used, chosen, with_record_fields(rest, rejected, name))
    if not _is_answer(rejected):
        raise UserError(
            f"{name!r} begins with a turn of role {rejected.messages[0]['role']!r}: it must be the answer alone; a whole "
            f"conversation is given as {WHOLE_ALONE!r}"
        )
    # As in ms-swift: all that follows the last question, calls and their results included.
    roles = [message["role"] for message in chosen.messages]
    if "user" not in roles:
        raise UserError(f"{fields[0]!r} has no turn of the user that {name!r} could answer: add one, or remove the record")
    num_prompt = len(roles) - roles[::-1].index("user")
    prompt = replace(chosen, messages=chosen.messages[:num_prompt], loss_flags=chosen.loss_flags[:num_prompt])
    return Sides((*fields, name), names, used, chosen, prompt + rejected, num_prompt)
