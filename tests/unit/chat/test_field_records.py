"""Records of users' files: names that others use for roles, reasoning, functions and training, in any order of turns."""

import json
from typing import Any

import pytest

from megatron.sft.chat.conversations import RecordReader
from megatron.sft.chat.fields import parsed_json
from megatron.sft.runtime.errors import UserError
from tests.unit.chat.test_formats import END, template, trained

Record = dict[str, Any]
USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "tide", "arguments": {"at": "Brest"}}}
CALL_TEXT = '<tool_call>\n{"name": "tide", "arguments": {"at": "Brest"}}\n</tool_call>'
CALL_JSON = json.dumps(CALL["function"])
THOUGHT = f"<think>\nR\n</think>\n\nA{END}"


def turns(*pairs: tuple[str, Any]) -> Record:
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


def refusal(record: Record, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        RecordReader(**settings).example(record)
    return str(error.value)


def render(record: Record, name: str = "qwen") -> str:
    example = RecordReader().example(record)
    return template(name).render(example.messages, example.tools, example.loss_flags).text


@pytest.mark.parametrize(
    "name",
    [
        *("loss", "train", "training", "weight", "loss_weight", "loss_scale", "loss_mask", "step_loss_mask", "trainable"),
        *("output_with_loss", "is_trainable", "train_on_turn"),
    ],
)
def test_a_turn_that_is_not_to_be_trained_is_not(name: str) -> None:
    first, second = ANSWER | {"content": "no", name: 0.0}, ANSWER | {"content": "yes", name: 1.0}
    assert trained(RecordReader().example({"messages": [USER, first, USER, second]})) == [f"yes{END}"]
    for value, shown in ((0.5, "0.5"), (-1, "-1"), ("no", "'no'"), ([1, 0], "a list")):
        assert f"messages[1].{name}' is {shown}" in refusal({"messages": [USER, ANSWER | {name: value}]})
    assert "role is 'user'" in refusal({"messages": [USER | {name: 1}, ANSWER]})


def test_masked_says_the_opposite() -> None:
    messages = [USER | {"masked": True}, ANSWER | {"masked": True}, USER, ANSWER | {"content": "yes", "masked": False}]
    assert trained(RecordReader().example({"messages": messages})) == [f"yes{END}"]
    assert "role is 'user'" in refusal({"messages": [USER | {"masked": False}, ANSWER]})


@pytest.mark.parametrize(
    "conversation",
    [
        [{"assistant": "A", "human": "Q"}, {"tool": "1", "assistant": "B"}],
        [{"human": "Q"}, {"gpt": "A"}, {"observation": "1", "gpt": "B"}],
        [{"input": "Q", "output": "A", "model": "m"}, {"output": "B", "input": "", "tool": "1"}],
    ],
)
def test_turns_by_role_come_in_the_order_of_a_conversation(conversation: list[Record]) -> None:
    text = render({"conversation": conversation}).partition("<|im_start|>user\n")[2]
    result = "<|im_start|>user\n<tool_response>\n1\n</tool_response>"
    assert text == f"Q{END}\n<|im_start|>assistant\nA{END}\n{result}{END}\n<|im_start|>assistant\nB{END}\n"


def test_nothing_of_a_turn_by_role_is_lost() -> None:
    pair = {"human": "Q", "assistant": "A"}
    assert "conversation[].persona" in refusal({"conversation": [{"human": "Q", "persona": "x"}, pair]})
    assert "role is 'user'" in refusal({"conversation": [{"human": "Q", "loss": 1}, pair]})
    two = {"conversation": [pair | {"output_with_loss": False}, {"human": "Q", "assistant": "B"}]}
    assert trained(RecordReader().example(two)) == [f"B{END}"]


@pytest.mark.parametrize("name", ["train_detail", "training_detail"])
def test_a_part_of_a_turn_cannot_be_trained(name: str) -> None:
    detail = [{"begin_offset": 0, "end_offset": 1, "train": False}]
    assert f"'messages[1].{name}'" in refusal({"messages": [USER, ANSWER | {name: detail}]})
    assert trained(RecordReader().example({"messages": [USER, ANSWER | {name: []}]})) == [f"A{END}"]


@pytest.mark.parametrize("name", ["weight", "loss_weight", "loss_scale", "sample_weight", "train", "loss"])
def test_a_weight_of_the_record_is_refused_by_name(name: str) -> None:
    record = {"messages": [USER, ANSWER]}
    assert trained(RecordReader().example(record | {name: 1.0})) == [f"A{END}"]
    for value in (0, 0.5, False):
        assert f"field {name!r} is {value!r}" in refusal(record | {name: value})
    assert "'loss_mask'" in refusal(record | {"loss_mask": [0, 1]}, ignores_unknown=False)
    assert "'mask'" in refusal(record | {"mask": "Assistant"})


@pytest.mark.parametrize(
    "name", ["reasoning_content", "reasoning", "thinking", "thought", "thoughts", "thinking_content", "reasoning_text"]
)
def test_reasoning_is_trained_by_any_of_its_names(name: str) -> None:
    assert trained(RecordReader().example({"messages": [USER, ANSWER | {name: "R"}]})) == [THOUGHT]
    assert trained(RecordReader().example({"instruction": "Q", "output": "A", name: "R"})) == [THOUGHT]
    assert trained(RecordReader().example({"conversation": [{"human": "Q", "assistant": "A", name: "R"}]})) == [THOUGHT]
    assert f"field {name!r} is not supported" in refusal({"messages": [USER, ANSWER], name: "R"})


def test_two_names_of_reasoning_must_agree() -> None:
    both = ANSWER | {"reasoning": "R", "reasoning_content": "R"}
    assert trained(RecordReader().example({"messages": [USER, both]})) == [THOUGHT]
    assert "'messages[1].reasoning' differs" in refusal({"messages": [USER, both | {"reasoning": "S"}]})


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "thinking", "thinking": "R", "signature": "x"}, {"type": "text", "text": "A"}],
        [{"type": "reasoning", "value": "R"}, {"type": "text", "value": "A"}],
        [{"type": "reasoning", "text": "R"}, {"type": "output_text", "text": "A", "annotations": []}],
    ],
)
def test_reasoning_may_be_a_part(parts: list[Record]) -> None:
    assert trained(RecordReader().example(turns(("user", "Q"), ("assistant", parts)))) == [THOUGHT]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "Q", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "value": "Q"},
        {"type": "input_text", "text": "Q"},
        {"text": "Q"},
    ],
)
def test_a_text_part_may_have_more_keys(part: Record) -> None:
    assert "user\nQ<|im_end|>" in render(turns(("user", [part]), ("assistant", "A")))


@pytest.mark.parametrize(
    "part, shown",
    [
        ({"type": "image_url", "image_url": {"url": "u"}}, "'image_url'"),
        ({"type": "image"}, "'image'"),
        ({"type": "input_audio", "input_audio": {}}, "'input_audio'"),
        ({"type": "tool_result", "content": "x"}, "'tool_result'"),
        ({"type": "text", "text": "Q", "spoken": "other"}, "content[0].spoken'"),
        ({"type": "text", "text": "Q", "value": "other"}, "'text' and 'value'"),
        ("Q", "'Q'"),
    ],
)
def test_a_part_that_says_something_else_is_refused_by_name(part: Any, shown: str) -> None:
    assert shown in refusal(turns(("user", [part]), ("assistant", "A")))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "system", "content": "Be brief.", "tools": [TOOL]}, USER, ANSWER]},
        {"messages": [{"role": "developer", "content": "Be brief.", "functions": [TOOL["function"]]}, USER, ANSWER]},
        {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER], "functions": json.dumps([TOOL])},
        {"messages": [{"role": "system", "content": "Be brief.", "tools": [TOOL]}, USER, ANSWER], "tools": [TOOL]},
        {"system_prompt": "Be brief.", "question": "Q", "response": "A", "tools": [TOOL]},
    ],
)
def test_functions_are_printed_wherever_the_record_names_them(record: Record) -> None:
    text = render(record)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert text.count('{"type": "function", "function": {"name": "tide", "parameters": {}}}') == 1


def test_a_system_turn_of_functions_alone_is_read() -> None:
    assert '"name": "tide"' in render({"messages": [{"role": "system", "tools": [TOOL]}, USER, ANSWER]})


def test_functions_elsewhere_are_refused() -> None:
    assert "role is 'user'" in refusal({"messages": [USER | {"tools": [TOOL]}, ANSWER]})
    other = {"name": "moon", "parameters": {}}
    system = {"role": "system", "content": "S", "tools": [other]}
    assert "other functions" in refusal({"messages": [system, USER, ANSWER], "tools": [TOOL]})


@pytest.mark.parametrize("role", ["system", "System", "developer", "SYSTEM"])
def test_names_of_the_system(role: str) -> None:
    assert render(turns((role, "S"), ("user", "Q"), ("assistant", "A"))).startswith("<|im_start|>system\nS<|im_end|>\n")


@pytest.mark.parametrize("user", ["User", "human", "HUMAN", "prompter"])
@pytest.mark.parametrize("assistant", ["Assistant", "gpt", "GPT", "bot", "model", "chatgpt", "ai", "Chatbot"])
def test_names_of_the_user_and_the_assistant(user: str, assistant: str) -> None:
    record = {"conversations": [{"from": user, "value": "Q"}, {"from": assistant, "value": "A"}]}
    assert render(record).endswith(f"<|im_start|>user\nQ{END}\n<|im_start|>assistant\nA{END}\n")


@pytest.mark.parametrize("tool", ["tool", "function", "observation", "ipython", "tool_response", "Tool Result", "environment"])
@pytest.mark.parametrize("call", ["function_call", "tool_call", "Function-Call", "tool_calls"])
def test_names_of_calls_and_results(tool: str, call: str) -> None:
    record = turns(("user", "Q"), (call, CALL_JSON), (tool, "rising"), ("assistant", "A"))
    assert trained(RecordReader().example(record | {"tools": [TOOL]})) == [CALL_TEXT + END, f"A{END}"]
    assert "<tool_response>\nrising\n</tool_response>" in render(record)


def test_consecutive_calls_and_a_text_before_them_are_one_answer() -> None:
    record = turns(
        *[("user", "Q"), ("assistant", "I look."), ("tool_call", CALL_JSON), ("tool_call", CALL_JSON)],
        *[("tool", "1"), ("tool", "2"), ("assistant", "A")],
    )
    example = RecordReader().example(record)
    assert example.messages[1] == {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]}
    assert trained(example) == [f"I look.\n{CALL_TEXT}\n{CALL_TEXT}{END}", f"A{END}"]
    record["messages"][1]["loss"], record["messages"][2]["loss"] = 0, 1
    assert "messages[2]" in refusal(record)


@pytest.mark.parametrize("arguments", [None, "", {}, "{}"])
def test_a_call_without_arguments_has_an_empty_object(arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "now", "arguments": arguments}}
    record = {"messages": [USER, ANSWER | {"content": "", "tool_calls": [call]}]}
    assert trained(RecordReader().example(record)) == [f'<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>{END}']


def test_calls_of_two_fields_must_be_the_same() -> None:
    call = {"role": "function_call", "content": CALL_JSON, "tool_calls": [CALL]}
    assert trained(RecordReader().example({"messages": [USER, call]})) == [CALL_TEXT + END]
    other = {"function": {"name": "moon", "arguments": {}}}
    assert "different calls" in refusal({"messages": [USER, call | {"tool_calls": [other]}]})
    assert "different calls" in refusal({"messages": [USER, call | {"function_call": other["function"]}]})


def test_what_calls_do_not_know_is_refused() -> None:
    call = {"function": {"name": "now", "arguments": {}, "note": "x"}}
    assert "'messages[1].tool_calls[0].function.note'" in refusal({"messages": [USER, ANSWER | {"tool_calls": [call]}]})
    call = {"function": {"name": "now", "arguments": {"a": 1}, "parameters": {"b": 2}}}
    assert "'arguments' and 'parameters'" in refusal({"messages": [USER, ANSWER | {"tool_calls": [call]}]})
    llama = {"name": "tide", "parameters": {"at": "Brest"}}
    record = {"messages": [USER, ANSWER | {"content": "", "tool_calls": [llama]}]}
    assert trained(RecordReader().example(record)) == [CALL_TEXT + END]


def test_integers_of_calls_stay_exact() -> None:
    text = '{"name": "f", "arguments": {"n": 123456789012345678901234567890}}'
    assert parsed_json(text, "x")["arguments"]["n"] == 123456789012345678901234567890
    (answer,) = trained(RecordReader().example(turns(("user", "Q"), ("function_call", text))))
    assert '"n": 123456789012345678901234567890}' in answer


@pytest.mark.parametrize(
    "messages, expected",
    [
        ([USER, USER, ANSWER], [f"A{END}"]),
        ([USER, ANSWER, ANSWER | {"content": "B"}], [f"A{END}", f"B{END}"]),
        ([USER, ANSWER, USER], [f"A{END}"]),
        ([USER, ANSWER, USER, USER], [f"A{END}"]),
        ([USER, ANSWER | {"content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}], [CALL_TEXT + END]),
        ([USER, ANSWER | {"content": "", "tool_calls": [CALL]}, USER, ANSWER], [CALL_TEXT + END, f"A{END}"]),
        ([USER, {"role": "tool", "content": "1"}, ANSWER], [f"A{END}"]),
        ([{"role": "system", "content": "S"}, ANSWER], [f"A{END}"]),
    ],
)
def test_the_template_decides_the_order_of_turns(messages: list[Record], expected: list[str]) -> None:
    assert trained(RecordReader().example({"messages": messages})) == expected


@pytest.mark.parametrize("messages", [[USER], [ANSWER], [ANSWER, USER], [USER, {"role": "tool", "content": "x"}]])
def test_without_an_answer_there_is_nothing_to_learn(messages: list[Record]) -> None:
    assert "no answer to learn" in refusal({"messages": messages})


def test_turns_of_any_order_are_split_into_rounds_that_join_to_the_whole() -> None:
    system = {"role": "system", "content": "S"}
    messages = [system, ANSWER, USER, USER, ANSWER, ANSWER, USER, ANSWER, USER]
    rounds = RecordReader().example({"messages": messages}).rounds()
    assert [len(example.messages) for example in rounds] == [6, 4]
    assert all(example.messages[0] == system for example in rounds)


@pytest.mark.parametrize("written", ["{{name}}", "{{ name }}", "{{NAME}}", "{{ Name }}", "{{NAME }}"])
def test_a_name_is_filled_in_any_capitals(written: str) -> None:
    reader = RecordReader(replaced={"{{NAME}}": r"Z\1ed", "{{AUTHOR}}": "Acme"})
    record = {"instruction": "Who?", "output": f"I am {written} of {{{{author}}}}."}
    assert trained(reader.example(record)) == [rf"I am Z\1ed of Acme.{END}"]
    assert reader.placeholders == {written: 1, "{{author}}": 1}
    code = RecordReader(replaced={"{{NAME}}": None})
    if written == "{{NAME}}":
        assert "set MODEL_NAME" in refusal(record, replaced={"{{NAME}}": None})
    else:  # may be a program's own
        assert code.example(record).messages[1]["content"] == record["output"]
        assert code.placeholders == {written: 1}


@pytest.mark.parametrize(
    "more, expected",
    [
        ({}, {}),
        ({"chat_template_kwargs": {"enable_thinking": False, "extra": None}}, {"enable_thinking": False}),
        ({"chat_template_kwargs": '{"enable_thinking": true}'}, {"enable_thinking": True}),
        ({"enable_thinking": False}, {"enable_thinking": False}),
    ],
)
def test_arguments_of_the_template_are_handed_on(more: Record, expected: Record) -> None:
    assert RecordReader().example({"messages": [USER, ANSWER]} | more).template_kwargs == expected
    assert RecordReader().example({"instruction": "Q", "output": "A"} | more).template_kwargs == expected


def test_arguments_that_are_not_the_templates_are_refused() -> None:
    record = {"messages": [USER, ANSWER]}
    for name in ("tools", "chat_template", "add_generation_prompt", "documents"):
        assert f"chat_template_kwargs.{name}'" in refusal(record | {"chat_template_kwargs": {name: "x"}})
    assert "'enable_thinking'" in refusal(record | {"enable_thinking": "yes"})
    both = {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}
    assert "'enable_thinking'" in refusal(record | both)


@pytest.mark.parametrize(
    "name, value",
    [
        *[("id", 7), ("conversation_id", "c"), ("dataSource", "x"), ("image_url", None), ("source", {"a": 1}), ("lang", "fr")],
        *[("score", 0.3), ("quality_score", "high"), ("score_chosen", 1), ("created_at", "2026"), ("license", "MIT")],
        *[("num_turns", 3), ("tokens", 99), ("category", "x"), ("tags", ["a"]), ("metadata", {"k": [1]}), ("model", "m")],
        *[("toxic", False), ("openai_moderation", [{"flagged": False}]), ("difficulty", "hard"), ("empty", ""), ("none", None)],
    ],
)
def test_fields_that_say_nothing_of_the_conversation_are_counted(name: str, value: Any) -> None:
    reader = RecordReader()
    assert trained(reader.example({"messages": [USER, ANSWER | {name: value}], name: value})) == [f"A{END}"]
    assert reader.ignored_fields == {name: 1, f"messages[].{name}": 1}


@pytest.mark.parametrize(
    "name, value",
    [
        *[("context", "Stars are far."), ("answer", "B"), ("documents", ["d"]), ("label", False), ("kto_tag", False)],
        *[("is_correct", False), ("importance", 0.5), ("input_ids", [1]), ("labels", [1]), ("assistant_masks", [0, 1])],
        *[("channel", "analysis"), ("prefix", True), ("end_turn", False), ("persona", "A sailor."), ("token_weights", [1])],
        *[("eval_loss", 3), ("sample_weights", 2), ("weight_score", 0)],
    ],
)
def test_a_field_that_could_say_what_is_said_or_trained_stops_the_run(name: str, value: Any) -> None:
    record = {"messages": [USER, ANSWER]}
    of_turns = {"messages": [USER, ANSWER | {name: value}]}
    for given, path in ((record | {name: value}, name), (of_turns, f"messages[].{name}")):
        message = refusal(given)
        assert f"field {path!r}" in message and "UNKNOWN_FIELDS=ignore" in message
        assert f'MAP_COLUMNS="{path}=-"' in message
        assert trained(RecordReader({path: "-"}).example(given)) == [f"A{END}"]
        ignoring = RecordReader(ignores_unknown=True)
        assert trained(ignoring.example(given)) == [f"A{END}"]
        assert ignoring.ignored_fields == {path: 1}


def test_a_field_of_turns_can_be_renamed() -> None:
    record = {"messages": json.dumps([USER, ANSWER | {"my_reasoning": "R"}])}
    reader = RecordReader({"messages[].my_reasoning": "messages[].reasoning"})
    assert trained(reader.example(record)) == [THOUGHT]


def test_a_field_that_repeats_the_conversation_says_nothing_more() -> None:
    reader = RecordReader()
    record = {"messages": [USER, ANSWER], "prompt": " Q\n", "conversations": [{"from": "gpt", "value": "A"}]}
    assert trained(reader.example(record)) == [f"A{END}"]
    alpaca = {"instruction": "Add 1.", "output": "Two.", "text": "Below is one.\n### Add 1.\n### Response: Two."}
    assert trained(reader.example(alpaca)) == [f"Two.{END}"]
    assert reader.ignored_fields == {"prompt": 1, "conversations": 1, "text": 1}
    assert "several formats" in refusal(record | {"prompt": "Other"})
    assert "several formats" in refusal(record | {"conversations": [{"from": "gpt", "value": "B"}]})


def test_the_field_of_the_group_is_known() -> None:
    record = {"messages": [USER, ANSWER], "problem": "P"}
    assert "'problem'" in refusal(record)
    assert RecordReader(also_used=frozenset({"problem"})).example(record).messages == [USER, ANSWER]


@pytest.mark.parametrize(
    "record, columns",
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "chosen=completion rejected=-"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "B"}]}, "chosen=messages rejected=-"),
        ({"query": "Q", "response": "A", "rejected_response": "B"}, "rejected_response=-"),
        ({"messages": [USER, ANSWER], "rejected_response": "B"}, "rejected_response=-"),
        ({"messages": [USER, ANSWER], "chosen": [USER, ANSWER], "rejected": [USER]}, "chosen=- rejected=-"),
    ],
)
def test_preferences_are_refused_with_advice_that_works(record: Record, columns: str) -> None:
    assert f'MAP_COLUMNS="{columns}"' in refusal(record)
    renamed = dict(column.split("=") for column in columns.split())
    assert trained(RecordReader(renamed).example(record)) == [f"A{END}"]


def test_no_columns_are_advised_that_do_not_help() -> None:
    message = refusal({"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]})
    assert "field 'preferred_output'" in message and "MAP_COLUMNS" not in message
