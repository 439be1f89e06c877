"""The formats of records: recognized by their fields, and read as turns. docs/data.md has them as a table."""

import contextlib
from typing import Any

from megatron.sft.chat.calls import joined_tools, read_calls, read_tools
from megatron.sft.chat.field_names import REASONING_FIELDS, SYSTEM_FIELDS, TOOLS_FIELDS
from megatron.sft.chat.fields import checked_list, is_filled, optional_text, parsed_json, required_text
from megatron.sft.chat.turns import ROLE_NAMES, Turns, read_turns, reasoning_of, with_reasoning, without_training
from megatron.sft.runtime.errors import UserError

LISTS = ("messages", "conversations", "conversation", "dialogue", "dialog")
# A question and the answer that usually comes with it.
PAIRS = {"instruction": "output", "query": "response", "prompt": "completion", "question": "response", "input": "output"}
ANSWERS = ("output", "response", "completion")
CALLS_FIELD = "answers"  # the calls that answer a query (xLAM)
TEXT = "text"
KWARGS_FIELDS = ("chat_template_kwargs", "enable_thinking")
CONTEXTS = ("input", "context")  # follow an instruction on a new line (Alpaca, Dolly)
# Names of other data sets, for the advice what to rename. `answer` is often the bare result next to a full answer.
OTHER_QUESTIONS = (*PAIRS, "problem", "user", "human", "inputs", "source", "src", "dialogue", "document", "article")
OTHER_ANSWERS = (*ANSWERS, "solution", "answer", "target", "targets", "tgt", "assistant", "gpt", "bot", "reply", "summary")


def format_fields(record: dict[str, Any]) -> tuple[str, ...]:
    """The fields that hold the conversation: one list, a question and its answer, or the text."""
    for names in ([name for name in record if record[name] is not None], list(record)):
        for name in (*LISTS, TEXT):
            if name in names and not (name == TEXT and any(answer in names for answer in ANSWERS)) and _may_be(name, record):
                return (name,)
        if found := _question_and_answer_fields(names):
            return found
    shown = ", ".join(map(repr, record)) or "none"
    question, answer = named(record, OTHER_QUESTIONS), named(record, OTHER_ANSWERS)
    turns = next((name for name, value in record.items() if _looks_like_turns(value)), None)
    advice = "rename columns with MAP_COLUMNS=OLD=NEW (--map-column)"
    if turns:
        advice = f'rename columns, here perhaps with MAP_COLUMNS="{turns}=messages"'
    elif question and answer:
        advice = f'rename columns, here perhaps with MAP_COLUMNS="{question}=instruction {answer}=output"'
    raise UserError(
        f"fields are {shown}; expected 'instruction' and 'output', or 'messages', or 'conversations', or 'query' and "
        f"'response', or 'prompt' and 'completion', or 'text': {advice}"
    )


def given_turns(value: Any) -> list[Any] | None:
    """The turns, if a field's value is a list of turns or one turn, which may be JSON text; None for any other value."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(UserError):
            parsed = parsed_json(value, "")
            turns = parsed if isinstance(parsed, list) else [parsed]
            if turns and all(isinstance(turn, dict) and any(name in turn for name in ROLE_NAMES) for turn in turns):
                return turns
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) else None


def _may_be(name: str, record: dict[str, Any]) -> bool:
    """Whether a field may hold what its name says: some data sets have a dialogue as text."""
    value = record[name]
    return name not in LISTS[2:] or not isinstance(value, str) or value.lstrip()[:1] == "["


def _looks_like_turns(value: Any) -> bool:
    """Whether a list holds texts, or objects with a role."""
    if not isinstance(value, list) or len(value) < 2:
        return False
    return all(isinstance(turn, str) or (isinstance(turn, dict) and any(name in turn for name in ROLE_NAMES)) for turn in value)


def _question_and_answer_fields(names: list[str]) -> tuple[str, ...]:
    """A usual pair, or the only question with the only answer; where one of both is missing, its usual partner."""
    for question, answer in PAIRS.items():
        if question in names and answer in names:
            return question, answer
    questions = [name for name in PAIRS if name in names]
    if len(questions) > 1 and questions[-1] == "input":
        questions.pop()
    answers = [name for name in ANSWERS if name in names]
    if len(questions) == 1 and {CALLS_FIELD, "tools"} <= set(names) and not answers:
        return questions[0], CALLS_FIELD
    if len(questions) == 1 and len(answers) == 1:
        return questions[0], answers[0]
    if questions and questions[0] not in ("question", "input"):
        return questions[0], PAIRS[questions[0]]
    return (next(name for name, answer in PAIRS.items() if answer == answers[0]), answers[0]) if answers else ()


def format_name(record: dict[str, Any], fields: tuple[str, ...]) -> str:
    """How a format is reported."""
    if fields[0] in LISTS:
        turns = record[fields[0]]
        is_sharegpt = isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]
        return "sharegpt" if is_sharegpt else fields[0]
    if fields == ("instruction", "output"):
        return "alpaca" if any(name in record for name in ("input", "history")) else "instruction"
    return "/".join(fields)


def used_fields(record: dict[str, Any], fields: tuple[str, ...]) -> set[str]:
    """The fields of a record that are read with a format."""
    if fields == (TEXT,):
        return {TEXT}
    used = {*fields, *SYSTEM_FIELDS, *TOOLS_FIELDS, *KWARGS_FIELDS}
    if _is_text_pair(record, fields):
        used |= {"history", *REASONING_FIELDS}
        used |= set(CONTEXTS) if fields[0] == "instruction" else set()
    return used


def _is_text_pair(record: dict[str, Any], fields: tuple[str, ...]) -> bool:
    return len(fields) == 2 and not isinstance(record.get(fields[0]), list)


def turns_of(record: dict[str, Any], fields: tuple[str, ...], needs_answer: bool) -> Turns:
    """The turns of a record, its system text first, with the functions of all its fields."""
    if fields[0] in LISTS:
        turns = read_turns(checked_list(record[fields[0]], fields[0], "turns"), fields[0])
    elif fields == ("prompt", "completion") and not isinstance(record.get("prompt"), str):
        turns = _prompt_and_completion(record, needs_answer)
    else:
        turns = _question_and_answer(record, fields, needs_answer)
    return with_record_fields(record, turns, fields[0])


def with_record_fields(record: dict[str, Any], turns: Turns, list_name: str) -> Turns:
    """The turns with what the record says of all of them: its system text first, its functions. list_name: of the turns."""
    turns.tools = joined_tools(turns.tools, read_tools(record), "tools")
    found = [name for name in SYSTEM_FIELDS if optional_text(record, name)]
    if not found:
        return turns
    if len(found) > 1:
        raise UserError(f'the record has both {found[0]!r} and {found[1]!r}: drop one, MAP_COLUMNS="{found[1]}=-"')
    if turns.messages[0]["role"] == "system":
        raise UserError(
            f"the record has a field {found[0]!r} and a system turn in {list_name!r}: keep one of them, for example with "
            f'MAP_COLUMNS="{found[0]}=-"'
        )
    first = Turns()
    first.add({"role": "system", "content": record[found[0]]})
    return first + turns


def question_turns(record: dict[str, Any], question_name: str) -> Turns:
    """The pairs of `history`, then a question. Alpaca's rule: `input` follows on a new line."""
    question = required_text(record, question_name)
    contexts = [name for name in CONTEXTS if question_name == "instruction" and optional_text(record, name)]
    if len(contexts) > 1:
        raise UserError("the record has both 'input' and 'context': drop one, for example with MAP_COLUMNS=\"context=-\"")
    turns = Turns()
    for index, pair in enumerate(checked_list(record.get("history"), "history", "pairs", or_none=True)):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"history[{index}] is not a pair of strings: write [question, answer]")
        texts = {"0": pair[0], "1": pair[1]}
        turns.add({"role": "user", "content": required_text(texts, "0", f"history[{index}].")})
        turns.add({"role": "assistant", "content": required_text(texts, "1", f"history[{index}].")})
    turns.add({"role": "user", "content": "\n".join([question, *(record[name] for name in contexts)])})
    return turns


def _question_and_answer(record: dict[str, Any], fields: tuple[str, ...], needs_answer: bool) -> Turns:
    question_name, answer_name = fields
    _check_present(record, fields if needs_answer else fields[:1])
    turns = question_turns(record, question_name)
    if not needs_answer and not is_filled(record.get(answer_name)):
        return turns
    if answer_name == CALLS_FIELD:
        calls = read_calls(record[CALLS_FIELD], CALLS_FIELD)
        if not calls:
            raise UserError(f"field {CALLS_FIELD!r} is empty: give at least one call, or remove the record")
        text = ""
    else:
        calls, text = [], required_text(record, answer_name)
    if reasoning := reasoning_of(record):
        text = with_reasoning(reasoning, text, "")
    turns.add({"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {}))
    return turns


def _check_present(record: dict[str, Any], fields: tuple[str, ...]) -> None:
    """Where a field is missing and another may be what is meant, the advice names that."""
    for name, others in zip(fields, (OTHER_QUESTIONS, OTHER_ANSWERS), strict=False):
        other = named({key: record[key] for key in record if key not in fields}, others) if name not in record else None
        if other:
            raise UserError(
                f'field {name!r} is missing: add it, or rename a column, here perhaps with MAP_COLUMNS="{other}={name}"'
            )


def named(record: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of these names that the record has with a text, in any capitals."""
    texts = {name.lower(): name for name in record if isinstance(record[name], str)}
    return next((texts[name] for name in names if name in texts), None)


def _prompt_and_completion(record: dict[str, Any], needs_answer: bool) -> Turns:
    """Two lists of messages: in `prompt` answers are trained only where they ask for it, in `completion` as usual."""
    for name in ("prompt", "completion")[: 1 + needs_answer]:
        if name not in record:
            raise UserError(f"field {name!r} is missing: add it, or rename a column with MAP_COLUMNS=OLD={name}")
    prompt = read_turns(checked_list(record["prompt"], "prompt", "turns, as 'completion' is"), "prompt")
    if not needs_answer and not is_filled(record.get("completion")):
        return without_training(prompt)
    completion = read_turns(checked_list(record["completion"], "completion", "turns, as 'prompt' is"), "completion")
    return without_training(prompt) + completion
