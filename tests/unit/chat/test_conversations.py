"""Every format of chat data becomes the same messages, and what is unknown or ambiguous is refused."""

import json
from typing import Any

import pytest

from megatron.sft.chat.conversations import Example, Messages, RecordReader
from megatron.sft.runtime.errors import UserError

ASKED, ANSWERED = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}
BEFORE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
FUNCTION = {"name": "add", "description": "Adds", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
CALLING = [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}, ANSWERED]


def example(record: dict[str, Any]) -> Example:
    return RecordReader().example(record)


def from_value(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in pairs]


@pytest.mark.parametrize(
    "record, expected, name",
    [
        ({"instruction": "Q", "output": "A"}, [ASKED, ANSWERED], "instruction"),
        ({"instruction": "Q", "input": "", "output": "A"}, [ASKED, ANSWERED], "alpaca"),
        (
            {"instruction": "Q", "input": "I", "output": "A", "system": "S", "history": [["a", "b"]]},
            [SYSTEM, *BEFORE, {"role": "user", "content": "Q\nI"}, ANSWERED],
            "alpaca",
        ),
        ({"query": "Q", "response": "A"}, [ASKED, ANSWERED], "query/response"),
        ({"query": "Q", "response": "A", "history": '[["a", "b"]]'}, [*BEFORE, ASKED, ANSWERED], "query/response"),
        ({"prompt": "Q", "completion": "A"}, [ASKED, ANSWERED], "prompt/completion"),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, [ASKED, ANSWERED], "prompt/completion"),
        ({"conversations": from_value(("human", "Q"), ("gpt", "A"))}, [ASKED, ANSWERED], "sharegpt"),
        ({"conversations": from_value(("user", "Q"), ("assistant", "A"))}, [ASKED, ANSWERED], "sharegpt"),
        ({"conversations": from_value(("human", "Q"), ("gpt", "A")), "system": "S"}, [SYSTEM, ASKED, ANSWERED], "sharegpt"),
        (
            {
                "conversations": from_value(
                    ("human", "Q"),
                    ("function_call", '{"name": "add", "arguments": {"x": 1}}'),
                    ("observation", "2"),
                    ("gpt", "A"),
                )
            },
            CALLING,
            "sharegpt",
        ),
        ({"id": "c-1", "conversations": [SYSTEM, ASKED, ANSWERED]}, [SYSTEM, ASKED, ANSWERED], "conversations"),
        ({"conversations": json.dumps([ASKED, ANSWERED])}, [ASKED, ANSWERED], "conversations"),
        ({"messages": [SYSTEM, ASKED, ANSWERED]}, [SYSTEM, ASKED, ANSWERED], "messages"),
        ({"messages": [ASKED, ANSWERED], "system": "S"}, [SYSTEM, ASKED, ANSWERED], "messages"),
        ({"messages": CALLING}, CALLING, "messages"),
        (
            {"messages": [ASKED, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]},
            [ASKED, ANSWERED],
            "messages",
        ),
        (
            {"messages": [ASKED, ANSWERED | {"reasoning_content": "R"}]},
            [ASKED, {"role": "assistant", "content": "<think>\nR\n</think>\n\nA"}],
            "messages",
        ),
    ],
)
def test_a_format_is_recognised_by_its_fields(record: dict[str, Any], expected: Messages, name: str) -> None:
    reader = RecordReader()
    assert reader.example(record).messages == expected
    assert reader.formats == {name: 1}


@pytest.mark.parametrize("tools", [[TOOL], [FUNCTION], json.dumps([TOOL]), json.dumps([FUNCTION]), [json.dumps(TOOL)]])
def test_functions_come_as_a_list_or_as_text(tools: Any) -> None:
    assert example({"messages": CALLING, "tools": tools}).tools == [TOOL]


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_functions_are_none(tools: Any) -> None:
    assert example({"messages": [ASKED, ANSWERED], "tools": tools}).tools is None


def test_arguments_stay_as_they_are_object_or_text() -> None:
    for arguments in ({"x": 1}, '{"x":1}'):
        call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
        messages = [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
        assert example({"messages": messages}).messages[1]["tool_calls"] == [call]


def test_plain_text_is_learned_as_it_is() -> None:
    assert example({"text": "Once."}) == Example([], text="Once.")


@pytest.mark.parametrize("value, expected", [(0, False), (1, True), (False, False), (True, True), (0.0, False)])
@pytest.mark.parametrize("name", ["loss", "train", "weight"])
def test_a_turn_may_say_whether_it_is_trained(name: str, value: Any, expected: bool) -> None:
    found = example({"messages": [ASKED, ANSWERED | {name: value}, ASKED, ANSWERED]})
    assert found.loss_flags == (None, expected, None, None)
    assert found.messages == [ASKED, ANSWERED, ASKED, ANSWERED]


def test_of_prompt_and_completion_lists_the_completion_is_trained() -> None:
    found = example({"prompt": [*BEFORE, ASKED], "completion": [ANSWERED]})
    assert found.loss_flags == (False, False, False, None)


def test_placeholders_are_filled_and_never_left() -> None:
    record = {"query": "Who are you?", "response": "{{NAME}}, made by {{AUTHOR}}. {{other}}"}
    named = RecordReader(replaced={"{{NAME}}": "Bo", "{{AUTHOR}}": "Us"}).example(record)
    assert named.messages[1]["content"] == "Bo, made by Us. {{other}}"
    with pytest.raises(UserError, match=r"placeholder \{\{AUTHOR\}\}: set MODEL_AUTHOR"):
        RecordReader(replaced={"{{NAME}}": "Bo", "{{AUTHOR}}": None}).example(record)


def test_a_column_can_be_skipped_and_what_is_ignored_is_counted() -> None:
    record = {"prompt": "x", "messages": [ASKED | {"time": 1}, ANSWERED], "id": 3}
    with pytest.raises(UserError, match=r'several formats \(messages and prompt\).*MAP_COLUMNS="prompt=-"'):
        RecordReader().example(record)
    reader = RecordReader({"prompt": "-"})
    assert reader.example(record).messages == [ASKED, ANSWERED]
    assert reader.ignored_fields == {"id": 1, "messages[].time": 1}


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": [ASKED, ANSWERED], "text": "x"}, "several formats (messages and text)"),
        ({"query": "Q", "output": "A", "instruction": "I"}, "several formats (instruction and query)"),
        ({"prompt": "Q"}, "field 'completion' is missing"),
        ({"prompt": [ASKED]}, "field 'completion' is missing"),
        ({"prompt": [ASKED], "completion": "A"}, "'completion' is text: it must be a list"),
        ({"text": 3}, "field 'text' is a number"),
        ({"text": ""}, "field 'text' is empty"),
        ({"text": "a\0b"}, "field 'text' has a NUL character"),
        ({"messages": [SYSTEM, ASKED, ANSWERED], "system": "S"}, "a field 'system' and a system turn"),
        ({"messages": [{"role": "narrator", "content": "S"}, ASKED, ANSWERED]}, "'narrator', an unknown role"),
        ({"messages": [ASKED, ANSWERED | {"loss": 0.5}]}, "messages[1].loss' is 0.5: it must be 0 or 1"),
        ({"messages": [ASKED, ANSWERED | {"loss": "yes"}]}, "messages[1].loss' is 'yes': it must be 0 or 1"),
        ({"messages": [ASKED, ANSWERED | {"loss": 0, "weight": 1}]}, "which disagree"),
        ({"messages": [ASKED | {"loss": 1}, ANSWERED]}, "asks for training, but its role is 'user'"),
        ({"messages": [ASKED | {"tool_calls": [CALL]}, ANSWERED]}, "'messages[0].tool_calls' is in a turn of role 'user'"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": "x"}]}, "'messages[1].tool_calls' is text"),
        (
            {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]},
            "messages[1].tool_calls[0].function.arguments' is a list",
        ),
        (
            {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}]},
            "messages[1].tool_calls[0].function.arguments' is not valid JSON",
        ),
        (
            {"conversations": from_value(("human", "Q"), ("function_call", "add(1)"))},
            "conversations[1].value' is not valid JSON",
        ),
        ({"messages": [ASKED, ANSWERED], "tools": {"name": "f"}}, "field 'tools' is an object"),
        ({"messages": [ASKED, ANSWERED], "tools": [{"description": "f"}]}, "field 'tools[0].function.name' is missing"),
        ({"messages": [ASKED, ANSWERED], "images": ["a.png"]}, "field 'images' is not supported"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWERED]},
            "messages[0].content[0]' is not a plain text part",
        ),
        ({"messages": [ASKED, ANSWERED | {"reasoning_content": "R", "content": "<think>x</think>A"}]}, "and <think> tags"),
        ({"instruction": "Q", "output": "A", "history": [["a", ""]]}, "field 'history[0].1' is empty"),
        ({"instruction": "Q", "output": "A", "tools": "x"}, "field 'tools' is text"),
    ],
)
def test_what_is_unknown_or_ambiguous_is_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        RecordReader().example(record)
    assert message in str(error.value)
