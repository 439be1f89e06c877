"""Any order of turns that the template prints in full, and the turn that is named where it does not."""

from typing import Any

import pytest

from megatron.sft.chat.conversations import Messages
from megatron.sft.chat.template import ChatTemplate
from megatron.sft.runtime.errors import UserError
from tests.support.rendering import call, trained, turns
from tests.unit.chat.test_templates import WEATHER, template_of

SUBMIT = [{"type": "function", "function": {"name": "submit", "description": "d", "parameters": {"type": "object"}}}]


def conversation(*turns_: tuple[str, Any]) -> Messages:
    return [{"role": role, "content": content} for role, content in turns_]


ORDERS: dict[str, Messages] = {
    "ends with a user": conversation(("user", "Hi"), ("assistant", "Yo."), ("user", "Bye")),
    "ends with two users": conversation(("user", "Hi"), ("assistant", "Yo."), ("user", "Bye"), ("user", "Bye!")),
    "ends with the system": conversation(("user", "Hi"), ("assistant", "Yo."), ("system", "Stop.")),
    "begins with the assistant": conversation(("assistant", "Welcome."), ("user", "Hi"), ("assistant", "Yo.")),
    "system, then the assistant": conversation(("system", "S"), ("assistant", "Welcome."), ("user", "Hi")),
    "two users": conversation(("user", "Sky on Mars?"), ("user", "In one word."), ("assistant", "Tan.")),
    "two assistants": conversation(("user", "Sky?"), ("assistant", "Tan."), ("assistant", "At night: black.")),
    "three assistants, then a user": conversation(
        ("user", "Sky?"), ("assistant", "Tan."), ("assistant", "Black."), ("assistant", "Red."), ("user", "Thanks")
    ),
    "system in the middle": conversation(("user", "Hi"), ("system", "Be brief."), ("assistant", "Yo.")),
    "system between rounds": conversation(
        ("user", "Hi"), ("assistant", "Yo."), ("system", "Be brief."), ("user", "Bye"), ("assistant", "Bye.")
    ),
    "two systems": conversation(("system", "A"), ("system", "B"), ("user", "Hi"), ("assistant", "Yo.")),
    "assistant, then system, then assistant": conversation(
        ("user", "Hi"), ("assistant", "Yo."), ("system", "More."), ("assistant", "Yo yo.")
    ),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["SmolLM2", "llama3_1", "llama3", "qwen3", "qwen3=chatml", "qwen3+qwen2_5"])
def test_every_answer_is_trained_in_any_order(name: str, order: str) -> None:
    template = template_of(name)
    end = "<|eot_id|>" if "llama" in name else "<|im_end|>"
    expected = [message["content"] + end for message in ORDERS[order] if message["role"] == "assistant"]
    found = [text.removeprefix("<think>\n\n</think>\n\n") for text in trained(template, ORDERS[order])]
    assert found == expected


def test_a_trajectory_ends_with_the_result_of_its_last_call() -> None:
    messages: Messages = [
        {"role": "user", "content": "Fix it."},
        {"role": "assistant", "content": "I submit the fix.", "tool_calls": [call("submit", {}, "c1")]},
        {"role": "tool", "tool_call_id": "c1", "content": "submitted"},
    ]
    expected = 'I submit the fix.\n<tool_call>\n{"name": "submit", "arguments": {}}\n</tool_call><|im_end|>'
    assert trained(template_of("qwen3"), messages, SUBMIT) == [expected]
    assert trained(template_of("qwen3"), [*messages, {"role": "user", "content": "Thanks"}], SUBMIT) == [expected]


def test_calls_in_turns_one_after_the_other() -> None:
    ask = {"role": "assistant", "content": "", "tool_calls": [call("get_weather", {"city": "Paris"})]}
    messages = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "I ask."}, ask, ask]
    hermes = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    found = trained(template_of("qwen3+qwen2_5"), [*messages, {"role": "tool", "content": "Rain"}], WEATHER)
    assert found == ["I ask.<|im_end|>", hermes, hermes]


def test_an_answer_without_its_header_cannot_be_proven() -> None:
    """Mistral's template writes two answers one after the other, and only what follows [/INST] is known as one."""
    found = trained(template_of("mistral"), ORDERS["two assistants"])
    assert found == ["Tan.</s>", "At night: black.</s>"]


def test_last_assistant_is_the_last_answer_though_turns_follow() -> None:
    base = template_of("SmolLM2")
    last = ChatTemplate(base.tokenizer, base.text, "last_assistant")
    messages = [*turns("Hi", "Yo.", "And?", "Well."), {"role": "user", "content": "Bye"}]
    assert trained(last, messages) == ["Well.<|im_end|>"]


def test_a_conversation_without_an_answer_is_refused() -> None:
    with pytest.raises(UserError, match="no turn of an assistant"):
        template_of("SmolLM2").render([{"role": "user", "content": "Hi"}])


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SHOUTS = NO_SYSTEM.replace("m.role != 'system'", "true").replace("m.content +", "m.content.replace('!', '!!') +")
OPENS = NO_SYSTEM.replace(
    "{{ '<|im_start|>' + m.role + '\\n' +", "{{ '<|im_start|>' + m.role + '\\n' + ('>' if '</' in m.content else '') +"
)


@pytest.mark.parametrize(
    "text, messages, turn",
    [
        (None, turns("2+2?", "Add them.\n</think>\n\n4"), 1),
        (None, turns("1+1?", "2", "2+2?", "Add them.\n</think>\n\n4"), 3),
        (NO_SYSTEM, ORDERS["system in the middle"], 1),
        (NO_SYSTEM, ORDERS["ends with the system"], 2),
        (SHOUTS, turns("Hi", "Yo!"), 1),
        (SHOUTS, turns("Hi!", "Yo"), 0),
        (SHOUTS, turns("Hi", "Yo", "Bye! Bye", "Yo"), 2),
        (OPENS, turns("Hi", "Yo</", "Bye", "Bye"), 1),
    ],
)
def test_the_faulty_turn_is_named(text: str | None, messages: Messages, turn: int) -> None:
    template = template_of("qwen3")
    template = ChatTemplate(template.tokenizer, text or template.text)
    with pytest.raises(UserError, match=rf"does not print turn {turn} \('{messages[turn]['role']}'\)"):
        template.render(messages)


def test_the_faulty_turn_is_named_after_functions() -> None:
    messages = turns("2+2?", "Add them.\n</think>\n\n4")
    with pytest.raises(UserError, match=r"does not print turn 1 \('assistant'\)"):
        template_of("qwen3").render(messages, WEATHER)
