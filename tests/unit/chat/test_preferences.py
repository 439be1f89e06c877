"""Preference records: each form that the field writes becomes two conversations, of which only the answers are trained."""

import json
import re
from typing import Any

import pytest

from megatron.sft.chat.conversations import Example, Pair, RecordReader, renamed_columns
from megatron.sft.runtime.errors import UserError
from tests.unit.chat.test_formats import END, objects_of, table_rows, trained, words

Record = dict[str, Any]
USER, CHOSEN, REJECTED = (
    {"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "A"), ("assistant", "B"))
)
TEXTS = {"prompt": "Q", "chosen": "A", "rejected": "B"}
WHOLE = {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}
APART = {"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]}
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {}}}


def read(record: Record, **settings: Any) -> Pair:
    pair = RecordReader(**settings).read(record)
    assert isinstance(pair, Pair)
    return pair


def answers(record: Record, **settings: Any) -> tuple[list[str], list[str]]:
    pair = read(record, **settings)
    return trained(pair.chosen), trained(pair.rejected)


def refusal(record: Record, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        RecordReader(**settings).read(record)
    assert "\n" not in str(error.value)
    return str(error.value)


def texts(example: Example) -> list[str]:
    return [message["content"] for message in example.messages]


PAIRS = table_rows("chosen", "rejected")


@pytest.mark.parametrize("name, record, chosen, rejected", PAIRS, ids=lambda text: text[:30])
def test_a_pair_of_the_table_trains_the_answers_that_it_says(name: str, record: str, chosen: str, rejected: str) -> None:
    pair = read(json.loads(record.strip("`")))
    assert (words(trained(pair.chosen)), words(trained(pair.rejected))) == (chosen, rejected)
    assert texts(pair.chosen)[: pair.num_prompt] == texts(pair.rejected)[: pair.num_prompt]
    assert pair.chosen.messages[pair.num_prompt - 1]["role"] == "user"
    assert (pair.chosen.tools, pair.chosen.template_kwargs) == (pair.rejected.tools, pair.rejected.template_kwargs)


@pytest.mark.parametrize("name, record, chosen, rejected", PAIRS, ids=lambda text: text[:30])
def test_a_field_anywhere_in_a_pair_is_not_lost(name: str, record: str, chosen: str, rejected: str) -> None:
    for index in range(len(objects_of(json.loads(record.strip("`"))))):
        for value in ("Words that are lost.", 0.5, False, ["x"], {"a": "b"}):
            fields = json.loads(record.strip("`"))
            objects_of(fields)[index]["extra"] = value
            message = refusal(fields)
            assert "extra" in message or "several formats (chosen and messages)" in message


@pytest.mark.parametrize("name, record, columns, expected", table_rows("MAP_COLUMNS", "trained without the other side"))
def test_the_chosen_side_can_be_read_as_a_conversation(name: str, record: str, columns: str, expected: str) -> None:
    fields = json.loads(record.strip("`"))
    example = RecordReader(renamed_columns(columns.strip("`").split())).read(fields)
    assert isinstance(example, Example)
    assert words(trained(example)) == expected
    # Where one conversation is wanted, as for questions to a model, the message says so.
    with pytest.raises(UserError) as error:
        RecordReader().example(fields)
    assert f'MAP_COLUMNS="{columns.strip("`")}"' in str(error.value)


def test_sides_may_be_texts_turns_lists_or_json_text_and_prompts_too() -> None:
    expected = ([f"A{END}"], [f"B{END}"])
    prompts: list[Record] = [{"prompt": "Q"}, {"prompt": [USER]}, {"messages": [USER]}, {"conversations": json.dumps([USER])}]
    prompts += [{"prompt": json.dumps([USER])}, {"question": "Q"}, {"query": "Q"}, {"instruction": "Q"}, {"input": "Q"}]
    for prompt in prompts:
        for form in (lambda turn: turn["content"], lambda turn: turn, lambda turn: [turn], lambda turn: json.dumps([turn])):
            pair = read(prompt | {"chosen": form(CHOSEN), "rejected": REJECTED})
            assert (trained(pair.chosen), trained(pair.rejected)) == expected
            assert texts(pair.chosen)[0] == "Q" and pair.num_prompt == 1
    assert answers({name: json.dumps(side) for name, side in WHOLE.items()}) == expected
    assert answers({"chosen": ["Q", "A"], "rejected": ["Q", "B"]}) == expected
    assert answers({"chosen": [{"human": "Q", "assistant": "A"}], "rejected": [{"human": "Q", "assistant": "B"}]}) == expected


def test_the_shared_beginning_of_whole_conversations_is_their_prompt() -> None:
    hello = [{"role": "system", "content": "S"}, USER, {"role": "assistant", "content": "Hello."}]
    pair = read({name: [*hello, *side] for name, side in WHOLE.items()})
    assert pair.num_prompt == 4
    assert (trained(pair.chosen), trained(pair.rejected)) == ([f"A{END}"], [f"B{END}"])
    # From the first answer that differs on, all answers are trained: the same turns after it, too.
    later = [USER, {"role": "assistant", "content": "Bye."}]
    assert answers({name: [*side, *later] for name, side in WHOLE.items()}) == (
        [f"A{END}", f"Bye.{END}"],
        [f"B{END}", f"Bye.{END}"],
    )
    # A prompt that is given ends where it ends, whatever follows on both sides.
    same = {"prompt": [USER], "chosen": [*hello[2:], USER, CHOSEN], "rejected": [*hello[2:], USER, REJECTED]}
    assert answers(same) == ([f"Hello.{END}", f"A{END}"], [f"Hello.{END}", f"B{END}"])


def test_a_rejected_response_answers_the_last_question_in_place_of_all_that_follows_it() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "tide", "arguments": {}}}]}
    messages = [USER, CHOSEN, USER, call, {"role": "tool", "content": "2"}, CHOSEN]
    pair = read({"messages": messages, "tools": [TOOL], "rejected_response": "B"})
    assert pair.num_prompt == 3
    assert len(trained(pair.chosen)) == 2 and trained(pair.rejected) == [f"B{END}"]
    assert texts(pair.rejected) == ["Q", "A", "Q", "B"]
    assert pair.chosen.tools == pair.rejected.tools == [TOOL]


def test_what_a_record_says_of_the_conversation_holds_for_both_sides() -> None:
    more = {"system": "S", "tools": json.dumps([TOOL]), "chat_template_kwargs": {"enable_thinking": False}}
    for record in (TEXTS, WHOLE, APART, {"messages": [USER, CHOSEN], "rejected_response": "B"}):
        pair = read(record | more)
        for example in (pair.chosen, pair.rejected):
            assert texts(example)[:2] == ["S", "Q"]
            assert (example.tools, example.template_kwargs) == ([TOOL], {"enable_thinking": False})


def test_turns_say_what_is_trained_of_the_answers_and_not_of_the_prompt() -> None:
    hello = {"role": "assistant", "content": "Hello."}
    no = hello | {"loss": 0}
    assert answers({"prompt": "Q", "chosen": [no, USER, CHOSEN], "rejected": "B"}) == ([f"A{END}"], [f"B{END}"])
    assert answers({"prompt": [USER, no, USER], "chosen": "A", "rejected": "B"}) == ([f"A{END}"], [f"B{END}"])
    for prompt in ([USER, hello | {"loss": 1}, USER], [USER, hello | {"weight": 1.0}, USER]):
        assert "turn 1 of 'chosen' is to be trained" in refusal({"prompt": prompt, "chosen": "A", "rejected": "B"})
    columns = {"prompt[].loss": "-"}
    assert answers({"prompt": [USER, no, USER], "chosen": "A", "rejected": "B"}, renamed_columns=columns)[0] == [f"A{END}"]


def test_columns_and_placeholders_work_on_both_sides() -> None:
    record = {
        "problem": "Q {{NAME}}",
        "better": "I am {{NAME}}.",
        "worse": {"role": "assistant", "content": "No {{NAME}}", "time": "x"},
    }
    columns = renamed_columns(["problem=prompt", "better=chosen", "worse=rejected", "worse[].time=-"])
    assert answers(record, renamed_columns=columns, replaced={"{{NAME}}": "Bo"}) == ([f"I am Bo.{END}"], [f"No Bo{END}"])
    of_openai = {"input": {"messages": [USER | {"note": "x"}]}, "win": "A", "lose": "B"}
    columns = renamed_columns(["win=preferred_output", "lose=non_preferred_output", "messages[].note=-"])
    assert answers(of_openai, renamed_columns=columns) == ([f"A{END}"], [f"B{END}"])


def test_names_of_the_two_sides_that_are_not_known_are_refused_with_columns_that_work() -> None:
    for names in (("chosen_text", "rejected_text"), ("preferred", "rejected_answer"), ("answer_chosen", "answer_rejected")):
        record = {"prompt": "Q", names[0]: "A", names[1]: "B"}
        message = refusal(record)
        columns = renamed_columns(re.findall(r'MAP_COLUMNS="([^"]*)"', message)[0].split())
        assert answers(record, renamed_columns=columns) == ([f"A{END}"], [f"B{END}"])


def test_a_record_whose_sides_are_empty_is_the_conversation_that_it_has() -> None:
    for record in ({"messages": [USER, CHOSEN]}, {"prompt": "Q", "completion": "A"}):
        example = RecordReader().read(record | {"chosen": None, "rejected": None, "rejected_response": ""})
        assert isinstance(example, Example)
        assert trained(example) == [f"A{END}"]


BAD: dict[str, tuple[Record, str]] = {
    "the chosen side is missing": ({"prompt": "Q", "rejected": "B"}, "field 'chosen' is missing"),
    "the rejected side is missing": ({"prompt": "Q", "chosen": "A"}, "field 'rejected' is missing"),
    "the other side of an answer": ({"prompt": "Q", "completion": "A", "rejected": "B"}, "field 'chosen' is missing"),
    "a side is empty": (TEXTS | {"rejected": ""}, "field 'rejected' is empty"),
    "a side is white space": (TEXTS | {"chosen": " \n"}, "field 'chosen' is empty"),
    "a side is an empty list": (WHOLE | {"rejected": []}, "field 'rejected' is empty"),
    "both sides are null": ({"prompt": "Q", "chosen": None, "rejected": None}, "field 'chosen' is empty"),
    "a side is a number": (TEXTS | {"chosen": 1}, "field 'chosen' is a number"),
    "the sides are equal": (TEXTS | {"rejected": "A"}, "'chosen' and 'rejected' are equal"),
    "whole sides are equal": (WHOLE | {"rejected": [USER, CHOSEN]}, "'chosen' and 'rejected' are equal"),
    "the rejected response is the answer": (
        {"messages": [USER, CHOSEN], "rejected_response": "A"},
        "'messages' and 'rejected_response' are equal",
    ),
    "the questions differ": (WHOLE | {"rejected": [USER | {"content": "R"}, REJECTED]}, "differ from turn 0 on"),
    "the system texts differ": (
        {"chosen": [{"role": "system", "content": "S"}, USER, CHOSEN], "rejected": [USER, REJECTED]},
        "differ from turn 0 on",
    ),
    "later questions differ": (
        {"chosen": [USER, CHOSEN, USER, CHOSEN], "rejected": [USER, CHOSEN, USER | {"content": "R"}, REJECTED]},
        "differ from turn 2 on",
    ),
    "results of a call differ": (
        {
            name: [
                USER,
                CHOSEN | {"tool_calls": [{"function": TOOL["function"] | {"arguments": {}}}]},
                {"role": "tool", "content": name},
            ]
            for name in ("chosen", "rejected")
        },
        "tool",
    ),
    "one is the beginning of the other": (
        WHOLE | {"rejected": [USER, CHOSEN, USER, REJECTED]},
        "'chosen' has nothing after the 2",
    ),
    "nothing is before the answers": ({"chosen": [CHOSEN], "rejected": [REJECTED]}, "differ from turn 0 on"),
    "a side ends with a question": (WHOLE | {"rejected": [USER]}, "'rejected' has nothing after the 1"),
    "only one side is whole": ({"prompt": "Q", "chosen": [USER, CHOSEN], "rejected": "B"}, "'chosen' is a whole conversation"),
    "answers without a prompt": ({"chosen": "A", "rejected": "B"}, "are answers without a prompt"),
    "one text for a conversation": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: B"},
        "field 'chosen' is a whole conversation in one text",
    ),
    "the prompt has the answer": (
        {"prompt": [USER, CHOSEN], "chosen": "A", "rejected": "B"},
        "'prompt' ends with the answer of 'chosen'",
    ),
    "another prompt": (WHOLE | {"prompt": "R"}, "several formats (chosen and prompt)"),
    "a third answer": (TEXTS | {"completion": "C"}, "several formats (prompt and completion)"),
    "two chosen sides": (TEXTS | {"chosen_response": "C"}, "has both 'chosen' and 'chosen_response'"),
    "functions differ": (
        {name: [{"role": "system", "content": "S", "tools": [{"name": name}]}, *side] for name, side in WHOLE.items()},
        "name other functions",
    ),
    "reasoning of which side": (TEXTS | {"reasoning": "R"}, "field 'reasoning' is not supported"),
    "an unknown field": (TEXTS | {"persona": "P"}, "field 'persona'"),
    "an unknown field of a turn": (WHOLE | {"rejected": [USER, REJECTED | {"channel": "final"}]}, "field 'rejected[].channel'"),
    "an unknown role": (WHOLE | {"rejected": [USER, REJECTED | {"role": "judge"}]}, "rejected[1].role is 'judge'"),
    "pictures": (TEXTS | {"images": ["a.png"]}, "field 'images' is not supported"),
    "a weight": (TEXTS | {"weight": 0.5}, "field 'weight' is 0.5"),
    "a list where an answer is wanted": (
        {"messages": [USER, CHOSEN], "rejected_response": [USER, REJECTED]},
        "'rejected_response' begins with a turn of role 'user'",
    ),
    "a text and a rejected response": ({"text": "Once.", "rejected_response": "B"}, "is next to a plain text"),
    "no question to answer": (
        {"messages": [{"role": "system", "content": "S"}, CHOSEN], "rejected_response": "B"},
        "'messages' has no turn of the user",
    ),
    "a field twice": (
        {"input": {"messages": [USER], "id": 1}, "id": 2, "preferred_output": [CHOSEN], "non_preferred_output": [REJECTED]},
        "both 'id' and 'input.id'",
    ),
    "judgements of one answer (KTO)": ({"prompt": "Q", "completion": "A", "label": True}, "field 'label' (True)"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_pair_is_refused_with_the_field(case: str) -> None:
    record, reason = BAD[case]
    assert reason in refusal(record)


@pytest.mark.parametrize(
    "record, columns",
    [
        (TEXTS | {"persona": "P"}, 'MAP_COLUMNS="persona=-"'),
        (WHOLE | {"rejected": [USER, REJECTED | {"channel": "x"}]}, 'MAP_COLUMNS="rejected[].channel=-"'),
        (APART | {"chosen": CHOSEN | {"channel": "x"}}, 'MAP_COLUMNS="chosen[].channel=-"'),
        (WHOLE | {"prompt": "R"}, 'MAP_COLUMNS="prompt=-"'),
        (TEXTS | {"chosen_response": "C"}, 'MAP_COLUMNS="chosen_response=-"'),
        (TEXTS | {"completion": "C"}, 'MAP_COLUMNS="completion=-"'),
        (TEXTS | {"reasoning": "R"}, 'MAP_COLUMNS="reasoning=-"'),
        ({"ask": "Q", "problem": "Q", "chosen": "A", "rejected": "B", "ask_id": 1}, 'MAP_COLUMNS="problem=prompt"'),
        (
            {
                "system": "S",
                "chosen": [{"role": "system", "content": "T"}, *WHOLE["chosen"]],
                "rejected": [{"role": "system", "content": "T"}, *WHOLE["rejected"]],
            },
            'MAP_COLUMNS="system=-"',
        ),
    ],
)
def test_the_columns_of_a_message_make_a_pair_that_is_read(record: Record, columns: str) -> None:
    assert columns in refusal(record, ignores_unknown="ask" in record)
    chosen = renamed_columns(columns.removeprefix('MAP_COLUMNS="').strip('"').split())
    assert answers(record, renamed_columns=chosen, ignores_unknown="ask" in record) == ([f"A{END}"], [f"B{END}"])
