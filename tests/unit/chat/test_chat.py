"""What is trained, written out, for real tokenizers and their own chat templates."""

import re
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.sft.chat.conversations import Example, Messages
from megatron.sft.chat.encoding import Conversation, check_against_template, encode, load_tokenizer
from megatron.sft.chat.template import ChatTemplate
from megatron.sft.runtime.errors import UserError
from tests.support.material import npm_tokenizer, smollm2_folder


def turns(*texts: str, system: str = "") -> Messages:
    """User and assistant texts in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return messages + [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]


SINGLE = turns("What colour is the sky?", "Blue.")
MULTI = turns("What colour is the sky?", "Blue.", "Grass? 🌱", "Green,\nmostly été 🌱.", "Thanks!", "You are welcome.")
SYSTEM = turns("What colour is the sky?", "Blue.", system="Be brief.")
REASONING = turns("What is 2+2?", "<think>\nTwo and two.\n</think>\n\n4")
NO_THOUGHT = "<think>\n\n</think>\n\n"
END_V3 = "<｜end▁of▁sentence｜>"

EXPECTED = [
    ("SmolLM2", SINGLE, ["Blue.<|im_end|>"]),
    ("SmolLM2", MULTI, ["Blue.<|im_end|>", "Green,\nmostly été 🌱.<|im_end|>", "You are welcome.<|im_end|>"]),
    ("SmolLM2", SYSTEM, ["Blue.<|im_end|>"]),
    ("SmolLM2", REASONING, ["<think>\nTwo and two.\n</think>\n\n4<|im_end|>"]),
    ("qwen3", SINGLE, [NO_THOUGHT + "Blue.<|im_end|>"]),
    ("qwen3", MULTI, ["Blue.<|im_end|>", "Green,\nmostly été 🌱.<|im_end|>", NO_THOUGHT + "You are welcome.<|im_end|>"]),
    ("qwen3", SYSTEM, [NO_THOUGHT + "Blue.<|im_end|>"]),
    ("qwen3", REASONING, ["<think>\nTwo and two.\n</think>\n\n4<|im_end|>"]),
    ("llama3_1", SINGLE, ["Blue.<|eot_id|>"]),
    ("llama3_1", MULTI, ["Blue.<|eot_id|>", "Green,\nmostly été 🌱.<|eot_id|>", "You are welcome.<|eot_id|>"]),
    ("llama3_1", SYSTEM, ["Blue.<|eot_id|>"]),
    ("llama3", SINGLE, ["Blue.<|eot_id|>"]),
    ("llama3", MULTI, ["Blue.<|eot_id|>", "Green,\nmostly été 🌱.<|eot_id|>", "You are welcome.<|eot_id|>"]),
    ("llama3", SYSTEM, ["Blue.<|eot_id|>"]),
    ("deepseek_v3", SINGLE, ["Blue." + END_V3]),
    ("deepseek_v3", MULTI, ["Blue." + END_V3, "Green,\nmostly été 🌱." + END_V3, "You are welcome." + END_V3]),
    ("deepseek_v3", SYSTEM, ["Blue." + END_V3]),
    ("deepseek_v3", REASONING, ["<think>\nTwo and two.\n</think>\n\n4" + END_V3]),
]

# The R1 distillations' template: drops what stands before </think>, and ends its prompt with <think>.
R1_DISTILL = (
    "{{bos_token}}{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}"
    "{%- endif %}{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
# As users of the hybrid recipe edit it: nothing dropped, no <think> in the prompt.
R1_EDITED = R1_DISTILL.replace("content.split('</think>')[-1]", "content").replace("<think>\\n", "\\n")
GENERATION_TAGS = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@cache
def tokenizer_of(name: str) -> Any:
    return load_tokenizer(smollm2_folder() if name == "SmolLM2" else npm_tokenizer(name))


class WithTemplate:
    """A tokenizer with another chat template for the length of a `with` block."""

    def __init__(self, name: str, template: str | dict[str, str]) -> None:
        self.tokenizer, self.template = tokenizer_of(name), template

    def __enter__(self) -> Any:
        self.before = self.tokenizer.chat_template
        self.tokenizer.chat_template = self.template
        return self.tokenizer

    def __exit__(self, *_: object) -> None:
        self.tokenizer.chat_template = self.before


def encoded(tokenizer: Any, messages: Messages) -> Conversation:
    return next(encode(tokenizer, [ChatTemplate(tokenizer).render(messages)]))


def trained_texts(tokenizer: Any, conversation: Conversation) -> list[str]:
    """The text of every trained run, decoded from its tokens."""
    ends = np.cumsum(conversation.mask_run_lengths).tolist()
    runs = zip([0, *ends], ends, strict=False)
    return [tokenizer.decode(conversation.tokens[start:end]) for start, end in list(runs)[1::2]]


@pytest.mark.parametrize("name, messages, expected", EXPECTED)
def test_answers_and_end_of_turn_are_trained_and_nothing_else(name: str, messages: Messages, expected: list[str]) -> None:
    tokenizer = tokenizer_of(name)
    conversation = encoded(tokenizer, messages)
    assert trained_texts(tokenizer, conversation) == expected
    check_against_template(ChatTemplate(tokenizer), Example(messages), conversation)


@pytest.mark.parametrize("name, end_of_turn", [("qwen3", 151645), ("llama3_1", 128009), ("llama3", 128009), ("SmolLM2", 2)])
def test_the_end_of_turn_token_is_found_even_where_eos_is_another(name: str, end_of_turn: int) -> None:
    template = ChatTemplate(tokenizer_of(name))
    template.render(MULTI)
    assert template.end_of_turn_ids == {end_of_turn}


@pytest.mark.parametrize("name", ["llama3_1", "llama3", "deepseek_v3"])
def test_a_conversation_begins_with_one_bos(name: str) -> None:
    tokenizer = tokenizer_of(name)
    tokens = encoded(tokenizer, SYSTEM).tokens.tolist()
    assert tokens[0] == tokenizer.bos_token_id
    assert tokens.count(tokenizer.bos_token_id) == 1


def test_white_space_that_a_template_trims_does_not_matter() -> None:
    tokenizer = tokenizer_of("llama3_1")
    messages = turns("  Hello \n", "\n\n Hi there.\n")
    assert trained_texts(tokenizer, encoded(tokenizer, messages)) == ["Hi there.<|eot_id|>"]


def test_white_space_around_think_tags_may_be_the_templates() -> None:
    tokenizer = tokenizer_of("qwen3")
    messages = turns("What is 2+2?", "<think>Two and two.</think>4")
    assert trained_texts(tokenizer, encoded(tokenizer, messages)) == ["<think>\nTwo and two.\n</think>\n\n4<|im_end|>"]


def test_a_header_token_that_takes_in_the_answers_first_line_break_is_not_trained() -> None:
    tokenizer = tokenizer_of("qwen3")
    conversation = encoded(tokenizer, turns("Hello", "\nHi there.", "Bye", "Bye."))
    assert trained_texts(tokenizer, conversation) == ["Hi there.<|im_end|>", NO_THOUGHT + "Bye.<|im_end|>"]
    assert conversation.num_merged_starts == 1


def test_tool_results_are_not_trained() -> None:
    tokenizer = tokenizer_of("qwen3")
    messages = [
        *turns("Weather?", "I look it up."),
        {"role": "tool", "content": "Rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    expected = ["I look it up.<|im_end|>", NO_THOUGHT + "It rains.<|im_end|>"]
    assert trained_texts(tokenizer, encoded(tokenizer, messages)) == expected


def test_what_the_template_writes_into_answers_is_trained_and_noted() -> None:
    template = ChatTemplate(tokenizer_of("qwen3"))
    template.render(SINGLE)
    assert any("<think>" in note and "writes" in note for note in template.notes)


@pytest.mark.parametrize("messages", [SINGLE, MULTI, SYSTEM], ids=["single", "multi", "system"])
def test_generation_tags_give_the_mask_of_transformers(messages: Messages) -> None:
    with WithTemplate("SmolLM2", GENERATION_TAGS) as tokenizer:
        conversation = encoded(tokenizer, messages)
        theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ours = np.repeat(np.arange(len(conversation.mask_run_lengths)) % 2, conversation.mask_run_lengths)
    assert conversation.tokens.tolist() == theirs["input_ids"]
    assert ours.tolist() == theirs["assistant_masks"]


def test_the_hybrid_recipes_template_trains_both_kinds_of_answers() -> None:
    with WithTemplate("deepseek_v3", R1_EDITED) as tokenizer:
        template = ChatTemplate(tokenizer)
        (short,) = encode(tokenizer, [template.render(turns("1+1?", "<short>\n2"))])
        (long,) = encode(tokenizer, [template.render(REASONING)])
        assert trained_texts(tokenizer, short) == ["<short>\n2" + END_V3]
        assert trained_texts(tokenizer, long) == ["<think>\nTwo and two.\n</think>\n\n4" + END_V3]
        # This prompt ends with a line break that no training text has, which must be said.
        assert any(r"ends its prompt for a new answer with '\n'" in note for note in template.notes)


def refusal(tokenizer: Any, messages: Messages) -> str:
    with pytest.raises(UserError) as error:
        ChatTemplate(tokenizer).render(messages)
    return str(error.value)


def test_a_template_that_drops_reasoning_is_refused() -> None:
    with WithTemplate("deepseek_v3", R1_DISTILL) as tokenizer:
        message = refusal(tokenizer, REASONING)
    assert "turn 1 ('assistant')" in message
    assert "remove <think> parts" in message


def test_a_template_that_drops_the_reasoning_of_earlier_turns_is_refused() -> None:
    messages = turns("2+2?", "<think>\nTwo and two.\n</think>\n\n4", "3+3?", "<think>\nThree.\n</think>\n\n6")
    assert "turn 1 ('assistant')" in refusal(tokenizer_of("qwen3"), messages)


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}", "added token"),
        ("{% for m in messages if m['role'] != 'system' %}{{ m['content'] + '<|im_end|>' }}{% endfor %}", "turn 0"),
        ("{% for m in messages %}{{ m['content'][:4] + '<|im_end|>' }}{% endfor %}", "once and in its place"),
        ("{{ raise_exception('no system text here') }}", "no system text here"),
    ],
    ids=["no end of turn", "system dropped", "text cut", "raises"],
)
def test_a_template_that_cannot_be_proven_is_refused(template: str, reason: str) -> None:
    with WithTemplate("SmolLM2", template) as tokenizer:
        assert reason in refusal(tokenizer, SYSTEM)


def test_a_generation_block_without_the_end_of_turn_is_refused() -> None:
    template = GENERATION_TAGS.replace(
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    with WithTemplate("SmolLM2", template) as tokenizer:
        assert "ends before the end-of-turn token" in refusal(tokenizer, SINGLE)


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    with pytest.raises(UserError, match=r"has no chat template: add a chat_template\.jinja"):
        load_tokenizer(npm_tokenizer("llama2"))


def test_templates_none_of_which_is_the_default_are_named() -> None:
    with WithTemplate("SmolLM2", {"tool_use": GENERATION_TAGS, "rag": GENERATION_TAGS}) as tokenizer:
        assert "has no chat template named default, only rag, tool_use: set CHAT_TEMPLATE" in refusal(tokenizer, SINGLE)


PIECES = ["a", " ", "\n", "é", "🙂", "<|im_end|>", "<|im_start|>assistant\n", "<think>", "</think>", "7", "."]
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join).filter(lambda text: bool(text.strip()))
# A thought without text and nothing after it is no answer: the next test.
answers_to_learn = texts.filter(lambda text: not re.fullmatch(r"\s*<think>\s*</think>\s*", text))


@given(answers=st.lists(st.tuples(texts, answers_to_learn), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_whatever_the_texts_say_the_answers_alone_are_trained(answers: list[tuple[str, str]]) -> None:
    tokenizer = tokenizer_of("SmolLM2")
    messages = turns(*(text for pair in answers for text in pair))
    rendered = ChatTemplate(tokenizer).render(messages)
    assert [rendered.text[start:end] for start, end in rendered.trained] == [answer + "<|im_end|>" for _, answer in answers]
    (conversation,) = encode(tokenizer, [rendered])
    # Leading white space may stand in the header's last token.
    found = [text.lstrip() for text in trained_texts(tokenizer, conversation)]
    assert found == [(answer + "<|im_end|>").lstrip() for _, answer in answers]


@pytest.mark.parametrize("answer", ["", "<think></think>", "<think>\n\n</think>\n"])
def test_an_answer_without_text_is_refused(answer: str) -> None:
    assert "turn 1 ('assistant') has no text to learn" in refusal(tokenizer_of("SmolLM2"), turns("2+2?", answer))


def test_the_work_grows_linearly_with_the_number_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first conversation of as many turns, a conversation is rendered once."""
    template = ChatTemplate(tokenizer_of("SmolLM2"))
    template.render(MULTI)
    num_renders = 0
    render = template.tokenizer.apply_chat_template

    def counted(*arguments: Any, **more: Any) -> str:
        nonlocal num_renders
        num_renders += 1
        return render(*arguments, **more)

    monkeypatch.setattr(template.tokenizer, "apply_chat_template", counted)
    template.render(turns("a", "b", "c", "d", "e", "f"))
    assert num_renders == 1
