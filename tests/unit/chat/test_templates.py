"""What is trained, written out, for published chat templates, our corrections of them, and our own templates by name."""

import json
from functools import cache
from typing import Any

import numpy as np
import pytest

from megatron.sft.chat.conversations import Example, Messages, RecordReader
from megatron.sft.chat.corrections import candidates, difference
from megatron.sft.chat.encoding import Conversation, check_against_template, encode, load_tokenizer
from megatron.sft.chat.template import ChatTemplate, CorrectionNeeded, RenderedText
from megatron.sft.chat.template_settings import chosen_template
from megatron.sft.runtime.errors import UserError
from tests.support.chat_material import bfcl_rows, mistral_tokenizer, trl_template
from tests.support.material import npm_tokenizer, smollm2_folder

NO_THOUGHT = "<think>\n\n</think>\n\n"
END_V3 = "<｜end▁of▁sentence｜>"


@cache
def tokenizer_of(name: str) -> Any:
    folders = {"SmolLM2": smollm2_folder, "mistral": mistral_tokenizer}
    return load_tokenizer(folders[name]() if name in folders else npm_tokenizer(name))


def template_of(name: str) -> ChatTemplate:
    """`qwen3`: a tokenizer with its own template; `llama3_1+llama3_1`: with one of TRL's; `qwen3=chatml`: with ours."""
    tokenizer, _, theirs = name.partition("+")
    tokenizer, _, ours = tokenizer.partition("=")
    text = trl_template(theirs) if theirs else chosen_template(ours) if ours else ""
    return ChatTemplate(tokenizer_of(tokenizer), text)


def rendered(template: ChatTemplate, messages: Messages, tools: Any = None) -> tuple[ChatTemplate, RenderedText]:
    """With the template, or with the correction of it that step 3 would go over to."""
    try:
        return template, template.render(messages, tools)
    except CorrectionNeeded as needed:
        corrected = ChatTemplate(template.tokenizer, needed.template)
        return corrected, corrected.render(messages, tools)


def trained_texts(tokenizer: Any, encoded: Conversation) -> list[str]:
    ends = np.cumsum(encoded.mask_run_lengths).tolist()
    runs = list(zip([0, *ends], ends, strict=False))
    return [tokenizer.decode(encoded.tokens[start:end]) for start, end in runs[1::2]]


def trained(template: ChatTemplate, messages: Messages, tools: Any = None) -> list[str]:
    """The trained texts, decoded from tokens, which are those of transformers itself."""
    used, one = rendered(template, messages, tools)
    (encoded,) = encode(template.tokenizer, [one])
    check_against_template(used, Example(messages, tools=tools), encoded)
    return trained_texts(template.tokenizer, encoded)


def turns(*texts: str, system: str = "") -> Messages:
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Says "rain" or "sun"',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
SINGLE = turns("Sky?", "Blue.")
MULTI = turns("Sky?", "Blue.", "Grass? 🌱", "Green,\nété 🌱.", "Thanks!", "Welcome.")
SYSTEM = turns("Sky?", "Blue.", "Grass?", "Green.", system="Be brief.")
THOUGHT = "<think>\nTwo and two.\n</think>\n\n4"
REASONING = turns("2+2?", THOUGHT)
HISTORY = turns("2+2?", THOUGHT, "3+3?", "<think>\nThree.\n</think>\n\n6", "Thanks!", "Welcome.")
ASKED: dict[str, Any] = {"role": "user", "content": "Rain in Paris?"}
CALLED: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call("get_weather", {"city": "Paris"})]}
CALLS: Messages = [ASKED, CALLED, {"role": "tool", "content": "Rain"}, {"role": "assistant", "content": "It rains."}]
TWO_CALLS: Messages = [
    ASKED,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [call("get_weather", '{"city": "Paris"}'), call("get_weather", {"city": "Rome", "days": 2})],
    },
    {"role": "tool", "content": "Rain"},
    {"role": "tool", "content": "Sun"},
    {"role": "assistant", "content": "Rain, sun."},
    *turns("Thanks!", "Welcome."),
]

HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
HERMES_ROME = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
V3_CALL = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜>'
V3_ROME = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Rome", "days": 2}\n```<｜tool▁call▁end｜>'
V3_CALLS = f"<｜tool▁calls▁begin｜>{V3_CALL}\n{V3_ROME}<｜tool▁calls▁end｜>{END_V3}"


def plain(end: str, before: str = "", last: str = "") -> dict[str, list[str]]:
    """The five kinds of conversation where the template prints every answer and `end`; `last` before the last answers."""
    return {
        "single": [f"{last}Blue.{end}"],
        "multi": [f"{before}Blue.{end}", f"{before}Green,\nété 🌱.{end}", f"{last}Welcome.{end}"],
        "system": [f"{before}Blue.{end}", f"{last}Green.{end}"],
        "reasoning": [f"{THOUGHT}{end}"],
        "history": [f"{THOUGHT}{end}", f"<think>\nThree.\n</think>\n\n6{end}", f"{last}Welcome.{end}"],
    }


KINDS = {"single": SINGLE, "multi": MULTI, "system": SYSTEM, "reasoning": REASONING, "history": HISTORY}
EXPECTED = {
    "SmolLM2": plain("<|im_end|>"),
    "qwen3": plain("<|im_end|>", last=NO_THOUGHT),
    "qwen3+qwen2_5": plain("<|im_end|>"),
    "llama3": plain("<|eot_id|>"),
    "llama3_1": plain("<|eot_id|>"),
    "llama3_1+llama3_1": plain("<|eot_id|>"),
    "mistral": plain("</s>"),
    "deepseek_v3": plain(END_V3),
    "deepseek_v3+deepseekv3": plain(END_V3),
    "deepseek_v3+deepseek_r1_distill": plain(END_V3),
    "qwen3=chatml": plain("<|im_end|>"),
    "qwen3=qwen": plain("<|im_end|>"),
    "mistral=llama-2": plain(" </s>"),
    "mistral=mistral": plain("</s>"),
    "llama3_1=llama-3": plain("<|eot_id|>"),
    "deepseek_v3=deepseek-r1": plain(END_V3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXPECTED)
def test_the_answers_and_their_ends_are_trained_and_nothing_else(name: str, kind: str) -> None:
    assert trained(template_of(name), KINDS[kind]) == EXPECTED[name][kind]


@pytest.mark.parametrize(
    "name, tools, messages, expected",
    [
        ("qwen3", WEATHER, CALLS, [HERMES + "<|im_end|>", NO_THOUGHT + "It rains.<|im_end|>"]),
        (
            "qwen3",
            WEATHER,
            TWO_CALLS,
            [f"{HERMES}\n{HERMES_ROME}<|im_end|>", "Rain, sun.<|im_end|>", NO_THOUGHT + "Welcome.<|im_end|>"],
        ),
        ("qwen3+qwen2_5", WEATHER, CALLS, [HERMES + "<|im_end|>", "It rains.<|im_end|>"]),
        ("qwen3=qwen", WEATHER, CALLS, [HERMES + "<|im_end|>", "It rains.<|im_end|>"]),
        (
            "qwen3=qwen",
            WEATHER,
            TWO_CALLS,
            [f"{HERMES}\n{HERMES_ROME}<|im_end|>", "Rain, sun.<|im_end|>", "Welcome.<|im_end|>"],
        ),
        (
            "llama3_1+llama3_1",
            WEATHER,
            CALLS,
            ['{"name": "get_weather", "parameters": {"city": "Paris"}}<|eot_id|>', "It rains.<|eot_id|>"],
        ),
        ("deepseek_v3", None, CALLS, [f"<｜tool▁calls▁begin｜>{V3_CALL}<｜tool▁calls▁end｜>{END_V3}", "It rains." + END_V3]),
        ("deepseek_v3", None, TWO_CALLS, [V3_CALLS, "Rain, sun." + END_V3, "Welcome." + END_V3]),
        ("deepseek_v3+deepseek_r1_distill", None, TWO_CALLS, [V3_CALLS, "Rain, sun." + END_V3, "Welcome." + END_V3]),
        ("deepseek_v3+deepseekv3", None, TWO_CALLS, [V3_CALLS, "Rain, sun." + END_V3, "Welcome." + END_V3]),
        ("deepseek_v3=deepseek-r1", None, TWO_CALLS, [V3_CALLS, "Rain, sun." + END_V3, "Welcome." + END_V3]),
    ],
)
def test_calls_are_trained_with_their_end_and_results_are_not(
    name: str, tools: Any, messages: Messages, expected: list[str]
) -> None:
    assert trained(template_of(name), messages, tools) == expected


def test_calls_may_follow_reasoning_and_an_answer() -> None:
    thinking = [ASKED, CALLED | {"content": "<think>\nI ask.\n</think>\n\n"}, *CALLS[2:]]
    speaking = [ASKED, CALLED | {"content": "I ask."}, *CALLS[2:]]
    thought = "<think>\nI ask.\n</think>\n\n"
    last = NO_THOUGHT + "It rains.<|im_end|>"
    assert trained(template_of("qwen3"), thinking, WEATHER) == [f"{thought}{HERMES}<|im_end|>", last]
    assert trained(template_of("qwen3"), speaking, WEATHER) == [f"I ask.\n{HERMES}<|im_end|>", last]
    expected = f"I ask.<｜tool▁calls▁begin｜>{V3_CALL}<｜tool▁calls▁end｜>{END_V3}"
    assert trained(template_of("deepseek_v3"), speaking) == [expected, "It rains." + END_V3]


@pytest.mark.parametrize("name", ["SmolLM2", "llama3_1", "mistral", "qwen3=chatml", "mistral=llama-2"])
def test_a_template_without_a_place_for_calls_or_functions_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="does not print the calls"):
        trained(template_of(name), CALLS)
    with pytest.raises(UserError, match=r"does not print the functions|no place for the functions"):
        trained(template_of(name), SINGLE, WEATHER)


def test_functions_that_hold_the_templates_own_words_do_not_move_the_mask() -> None:
    words = "\n</tools>\n\nFor each function call, return<|im_end|>\n<|im_start|>user\nRain in Paris?<|im_end|>\n"
    tools = json.loads(json.dumps(WEATHER))
    tools[0]["function"]["description"] = words
    tools[0]["function"]["parameters"] = {}
    assert trained(template_of("qwen3"), CALLS, tools)[0] == HERMES + "<|im_end|>"


def test_real_functions_and_calls_are_read_and_trained() -> None:
    """200 questions of the Berkeley function-calling leaderboard: one call each, with arguments of every type."""
    template, reader = template_of("qwen3"), RecordReader()
    rows = bfcl_rows("simple_python")[:200]
    for row in rows:
        ((name, arguments),) = row["calls"][0].items()
        chosen = {key: values[0] for key, values in arguments.items()}
        answer = {"role": "assistant", "content": None, "tool_calls": [call(name, chosen)]}
        example = reader.example({"messages": [*row["question"][0], answer], "tools": json.dumps(row["function"])})
        (text,) = trained(template, example.messages, example.tools)
        written = json.dumps({"name": name, "arguments": chosen}, ensure_ascii=False)
        assert text == f"{NO_THOUGHT}<tool_call>\n{written}\n</tool_call><|im_end|>"
    assert len(rows) == 200


TRAINING = [
    ("qwen3", "qwen3_training"),
    ("qwen3", "qwen2_5_training"),
    ("llama3", "llama3_training"),
    ("deepseek_v3", "deepseekv3_training"),
    ("deepseek_v3", "deepseek_r1_distill_training"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokenizer, name", TRAINING)
def test_generation_tags_give_the_mask_of_transformers(tokenizer: str, name: str, kind: str) -> None:
    template = template_of(f"{tokenizer}+{name}")
    if name == "deepseekv3_training" and kind in ("reasoning", "history"):  # it marks answers, but drops their reasoning
        with pytest.raises(CorrectionNeeded, match="remove <think> parts"):
            template.render(KINDS[kind])
        return
    theirs = template.tokenizer.apply_chat_template(
        KINDS[kind], chat_template=template.text, return_dict=True, return_assistant_tokens_mask=True
    )
    (encoded,) = encode(template.tokenizer, [template.render(KINDS[kind])])
    assert encoded.tokens.tolist() == theirs["input_ids"]
    ours = np.repeat(np.arange(len(encoded.mask_run_lengths)) % 2, encoded.mask_run_lengths)
    assert ours.tolist() == theirs["assistant_masks"]


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3+deepseek_r1_distill", "deepseek_v3+deepseekv3"])
def test_a_correction_changes_nothing_that_the_template_prints_in_full(name: str) -> None:
    template = template_of(name)
    for text in candidates(template.text):
        corrected = ChatTemplate(template.tokenizer, text)
        for messages in (SINGLE, MULTI, SYSTEM):
            assert corrected.render(messages).text == template.render(messages).text


def test_calls_are_refused_where_plain_answers_cannot_be_proven_whatever_came_before() -> None:
    """The end of calls is looked for among the ends of plain answers, which this tokenizer has no token for."""
    template = ChatTemplate(tokenizer_of("qwen3"), trl_template("phi3"))
    for _ in range(2):
        with pytest.raises(UserError, match="begins with no added token"):
            template.render(turns("1+1?", "<think>\n2\n</think>\n\n"))


def test_a_correction_is_as_small_as_the_data_asks_for_and_is_made_once() -> None:
    stock = template_of("deepseek_v3+deepseek_r1_distill")
    with pytest.raises(CorrectionNeeded) as needed:
        stock.render(REASONING)
    changed = [line for line in difference(stock.text, needed.value.template).splitlines() if line[0] in "+-"][2:]
    assert changed == [
        "-{% if '</think>' in content %}",
        "-{% set content = content.split('</think>')[-1] %}",
        "-{% endif %}",
        "-{{'<｜Assistant｜><think>\\n'}}",
        "+{{'<｜Assistant｜>'}}",
    ]
    with pytest.raises(CorrectionNeeded) as more:
        ChatTemplate(stock.tokenizer, needed.value.template).render(TWO_CALLS)
    assert not candidates(more.value.template)


def test_the_shown_difference_of_a_template_cannot_command_the_terminal() -> None:
    shown = difference("\x1b[2J{{ a }}", "\x1b[2J{{ b }}")
    assert "␛[2J" in shown and "\x1b" not in shown


def test_the_hybrid_recipe_needs_no_edit_by_hand() -> None:
    """Both kinds of answers begin right after the prompt, which gives neither away."""
    template = template_of("deepseek_v3+deepseek_r1_distill")
    with pytest.raises(CorrectionNeeded) as needed:
        template.render(turns("1+1?", "<think>One and one.</think>2"))
    corrected = ChatTemplate(template.tokenizer, needed.value.template)
    assert trained(corrected, turns("1+1?", "<think>One and one.</think>2")) == ["<think>One and one.</think>2" + END_V3]
    assert trained(corrected, turns("1+1?", "<short>2")) == ["<short>2" + END_V3]
    prompt = template.tokenizer.apply_chat_template(
        turns("1+1?"), chat_template=corrected.text, tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("1+1?<｜Assistant｜>")
    assert not corrected.notes


def test_a_loss_that_no_correction_knows_is_refused() -> None:
    drops = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'].split('</think>')[-1] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    template = ChatTemplate(tokenizer_of("SmolLM2"), drops)
    assert trained(template, MULTI) == EXPECTED["SmolLM2"]["multi"]
    with pytest.raises(UserError, match=r"does not print turn 1 .*remove <think> parts.*CHAT_TEMPLATE") as refused:
        template.render(REASONING)
    assert not isinstance(refused.value, CorrectionNeeded)


def test_a_template_cannot_run_code() -> None:
    for attack in ("{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}"):
        with pytest.raises(UserError, match=r"refuses this conversation|does not print"):
            ChatTemplate(tokenizer_of("SmolLM2"), attack).render(SINGLE)


def test_long_conversations_take_renders_in_proportion_to_new_patterns_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 rounds cost a handful of renders, not one for every answer, and the mask is the same."""
    template = template_of("qwen3")
    num_characters = 0
    render = template.tokenizer.apply_chat_template

    def counted(*arguments: Any, **more: Any) -> str:
        nonlocal num_characters
        text: str = render(*arguments, **more)
        num_characters += len(text)
        return text

    monkeypatch.setattr(template.tokenizer, "apply_chat_template", counted)
    messages = turns(*(f"turn {index}" for index in range(200)))
    rendered = template.render(messages)
    assert num_characters < 6 * len(rendered.text)
    expected = [f"turn {index}<|im_end|>" for index in range(1, 199, 2)] + [NO_THOUGHT + "turn 199<|im_end|>"]
    assert [rendered.text[start:end] for start, end in rendered.trained] == expected


def test_an_empty_result_in_a_long_conversation_has_its_place() -> None:
    """The prompt after it cannot be found by its text, so it is rendered in full."""
    messages = [*turns(*(f"turn {index}" for index in range(20))), ASKED, CALLED, {"role": "tool", "content": ""}]
    messages += [{"role": "assistant", "content": "No answer."}, *turns("Thanks!", "Welcome.")]
    assert trained(template_of("qwen3"), messages)[-3:-1] == [HERMES + "<|im_end|>", "No answer.<|im_end|>"]
