"""EMPTY_THINK, TEMPLATE_DATE, TEMPLATE_KWARGS and tokenizers with several templates: the trained text and the manifest."""

import json
import shutil
import signal
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.sft import tokenize
from megatron.sft.chat.corrections import EMPTY_THINK
from megatron.sft.chat.encoding import load_tokenizer
from megatron.sft.chat.template import ChatTemplate, CorrectionNeeded
from megatron.sft.chat.template_settings import with_defaults
from megatron.sft.conversion.exported_files import read_named_template, write_chat_template
from megatron.sft.data.tokenized import TokenizedRows
from megatron.sft.runtime.errors import UserError
from tests.support.chat_material import trl_template
from tests.support.material import npm_tokenizer, smollm2_folder
from tests.support.rendering import call, template_for, trained, turns
from tests.unit.chat.test_templates import NO_THOUGHT, WEATHER, template_of

ROUNDS = turns("first", "one", "second", "two")
END = "<|im_end|>"
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Step 3 on records with Qwen3's tokenizer (`template`: with this instead of its own); the manifest with the `trained`
    texts, and `texts`, the whole rows."""
    model = tmp_path / "model"
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def tokenise(records: list[dict[str, Any]], *options: str, template: Any = None) -> dict[str, Any]:
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(npm_tokenizer("qwen3"), model)
        if template is not None:
            config = json.loads((model / "tokenizer_config.json").read_text())
            (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
        inputs = ["--tokenizer", str(model), "--input", str(tmp_path / "data.jsonl"), "--seq-length", "512"]
        assert tokenize.main([*inputs, "--num-workers", "1", "--no-packing", *options]) == 0
        rows = TokenizedRows(tmp_path / "Tokenized-data-model-512_text_document")
        tokenizer = load_tokenizer(model)
        found = []
        for row in rows:
            edges = np.flatnonzero(np.diff(row.trained.astype(int), prepend=0, append=0))
            found += [tokenizer.decode(row.tokens[start:end]) for start, end in edges.reshape(-1, 2)]
        return rows.manifest | {"trained": found, "texts": [tokenizer.decode(row.tokens) for row in rows]}

    return tokenise


def test_every_answer_begins_alike_unless_the_setting_says_otherwise(run: Run) -> None:
    record = {"messages": ROUNDS}
    block, every = NO_THOUGHT + "one" + END, NO_THOUGHT + "two" + END
    default = run([record])
    assert default["trained"] == [block, every]
    assert (default["empty_think"], default["chat_template_changed"]) == ("every", True)
    assert "not reasoning_content" in default["chat_template_diff"]
    own = run([record], "--empty-think", "template")
    assert own["trained"] == ["one" + END, every]
    assert (own["empty_think"], own["chat_template_changed"]) == ("template", False)
    none = run([record], "--empty-think", "none")
    assert none["trained"] == ["one" + END, "two" + END]
    assert (none["empty_think"], none["chat_template_changed"]) == ("none", True)
    assert len({manifest["fingerprint"] for manifest in (default, own, none)}) == 3


def test_a_single_answer_needs_no_other_template(run: Run) -> None:
    manifest = run([{"messages": ROUNDS[:2]}])
    assert manifest["trained"] == [NO_THOUGHT + "one" + END]
    assert not manifest["chat_template_changed"]


def wanted(name: str, empty_think: str) -> ChatTemplate:
    base = template_of(name)
    return ChatTemplate(base.tokenizer, base.text, empty_think=empty_think)


THOUGHT = "<think>\nHm.\n</think>\n\n"
ASKING = {"role": "assistant", "content": "", "tool_calls": [call("get_weather", {"city": "Paris"})]}
CALLING = [{"role": "user", "content": "Rain?"}, ASKING, {"role": "tool", "content": "Rain"}, *turns("", "Yes.")[1:]]
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>' + END


@pytest.mark.parametrize(
    "messages, every, none",
    [
        (
            turns("a", THOUGHT + "b", "c", "d", "e", THOUGHT + "f"),
            [THOUGHT + "b", NO_THOUGHT + "d", THOUGHT + "f"],
            [THOUGHT + "b", "d", THOUGHT + "f"],
        ),
        (turns("a", NO_THOUGHT + "b", "c", "d"), [NO_THOUGHT + "b", NO_THOUGHT + "d"], ["b", "d"]),
        ([*ROUNDS, {"role": "user", "content": "Bye"}], [NO_THOUGHT + "one", NO_THOUGHT + "two"], ["one", "two"]),
        (turns("a", "b", "c", THOUGHT + "d"), [NO_THOUGHT + "b", THOUGHT + "d"], ["b", THOUGHT + "d"]),
    ],
    ids=["reasoning between", "the data's own block", "ends with a user", "reasoning last"],
)
def test_answers_with_and_without_reasoning(messages: Any, every: list[str], none: list[str]) -> None:
    assert trained(wanted("qwen3", "every"), messages) == [text + END for text in every]
    assert trained(wanted("qwen3", "none"), messages) == [text + END for text in none]


def test_calls_begin_as_other_answers_do() -> None:
    assert trained(wanted("qwen3", "every"), CALLING, WEATHER) == [NO_THOUGHT + HERMES, NO_THOUGHT + "Yes." + END]
    assert trained(wanted("qwen3", "none"), CALLING, WEATHER) == [HERMES, "Yes." + END]


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6", "qwen3_5_nothink"])
def test_the_templates_after_qwen3_are_known(name: str) -> None:
    """Their prompt may open the block, which is then not trained."""
    text = trl_template(name)
    (first, second) = trained(template_for(text, empty_think="every"), ROUNDS)
    assert first.replace("one", "two") == second
    assert [text.rpartition("\n")[2] for text in (first, second)] == ["one" + END, "two" + END]
    assert trained(template_for(text, empty_think="none"), ROUNDS) == ["one" + END, "two" + END]


@pytest.mark.parametrize("empty_think", EMPTY_THINK)
@pytest.mark.parametrize("name", ["SmolLM2", "llama3_1", "qwen3+qwen2_5", "deepseek_v3", "mistral", "qwen3=chatml"])
def test_templates_without_blocks_do_not_change(name: str, empty_think: str) -> None:
    for messages in (ROUNDS, turns("a", THOUGHT + "b", "c", "d")):
        template = wanted(name, empty_think)
        assert template.render(messages) == template_of(name).render(messages)


def test_an_unknown_template_with_blocks_in_some_answers_is_noted_once() -> None:
    text = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if loop.last %}{{ '<think></think>' }}{% endif %}"
        "{{ m.content + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    template = template_for(text, empty_think="every")
    assert trained(template, ROUNDS) == ["one" + END, "<think></think>two" + END]
    assert any("EMPTY_THINK=every" in note for note in template.notes)


DATED = (
    "{{- '<|im_start|>system\\nToday: ' + strftime_now('%d %b %Y %H:%M') + '<|im_end|>\\n' }}{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)


def test_a_run_has_one_date(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    days = iter(range(1, 29))

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Clock":
            return cls(2026, 11, next(days))

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    records = [{"messages": turns(str(index), "yes")} for index in range(20)]
    manifest = run(records, "--template-date", "2024-07-26", template=DATED)
    assert manifest["template_date"] == "2024-07-26"
    assert all("Today: 26 Jul 2024 00:00" in text for text in manifest["texts"])
    today = run(records, template=DATED)
    assert today["template_date"] == str(date.today())
    assert all(date.today().strftime("Today: %d %b %Y 00:00") in text for text in today["texts"])
    assert today["fingerprint"] != manifest["fingerprint"]


def test_the_date_is_the_same_for_tags_and_macros() -> None:
    day = date(2025, 1, 2)
    macro = DATED.replace(
        "{{- '<|im_start|>system", "{%- macro now(f) %}{{ strftime_now(f) }}{% endmacro %}{{- '<|im_start|>system"
    ).replace("strftime_now('", "now('")
    tags = DATED.replace(
        "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}",
        "{{- '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'user' %}{{ m.content + '<|im_end|>' }}{% else %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% endif %}{{ '\\n' }}",
    )
    for text in (DATED, macro, tags):
        rendered = template_for(text, day=day).render(turns("Hi", "Yo."))
        assert "Today: 02 Jan 2025 00:00" in rendered.text
    other = template_for(DATED, day=date(2026, 3, 4)).render(turns("Hi", "Yo."))
    assert "Today: 04 Mar 2026" in other.text


def test_a_template_without_a_date_has_none_in_its_manifest(run: Run) -> None:
    assert run([{"messages": ROUNDS}])["template_date"] is None


@pytest.mark.parametrize("value", ["26 Jul 2024", "2024-13-01", "today"])
def test_a_date_that_is_none_is_refused(run: Run, value: str) -> None:
    with pytest.raises(UserError, match="TEMPLATE_DATE"):
        run([{"messages": ROUNDS}], "--template-date", value)


def test_arguments_of_all_records_are_kept_in_the_template(run: Run) -> None:
    manifest = run([{"messages": ROUNDS[:2]}], "--template-kwargs", '{"enable_thinking": false}')
    assert manifest["template_kwargs"] == {"enable_thinking": False}
    assert manifest["trained"] == ["one" + END], "the prompt has the empty block"
    assert manifest["chat_template_changed"]
    tokenizer = template_of("qwen3").tokenizer
    question = [{"role": "user", "content": "Hi"}]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    exported = tokenizer.apply_chat_template(question, chat_template=manifest["chat_template"], **options)
    assert exported == tokenizer.apply_chat_template(question, enable_thinking=False, **options)
    thinking = tokenizer.apply_chat_template(question, chat_template=manifest["chat_template"], enable_thinking=True, **options)
    assert thinking == tokenizer.apply_chat_template(question, **options), "a caller may ask for another"


@pytest.mark.parametrize("value", [False, True, None, 3, 1.5, "a\"b'c\\d\n%}{{ x }}é🌱", [1, "a", None], {"a": {"b": [True]}}])
def test_any_value_can_be_a_default(value: Any) -> None:
    text = "\nA{{ x | tojson }}\n{% if y is defined %}{{ y }}{% endif %} B"
    tokenizer = template_of("qwen3").tokenizer
    options: dict[str, Any] = {"tokenize": False}
    given = tokenizer.apply_chat_template(ROUNDS, chat_template=text, x=value, **options)
    assert tokenizer.apply_chat_template(ROUNDS, chat_template=with_defaults(text, {"x": value}), **options) == given


def test_a_records_own_arguments_are_used_for_it() -> None:
    template = wanted("qwen3", "template")
    assert trained(template, ROUNDS[:2]) == [NO_THOUGHT + "one" + END]
    assert trained(template, ROUNDS[:2], kwargs={"enable_thinking": False}) == ["one" + END]
    assert trained(template, ROUNDS[:2], kwargs={"enable_thinking": True}) == [NO_THOUGHT + "one" + END]
    kept = template_for(trl_template("qwen3_6"))
    answers = turns("a", THOUGHT + "b", "c", "d")
    assert trained(kept, answers, kwargs={"preserve_thinking": True})[0].endswith("b" + END)
    with pytest.raises(CorrectionNeeded):
        kept.render(answers, None, (), {"preserve_thinking": False})


def test_arguments_that_are_not_used_or_not_allowed() -> None:
    template = wanted("qwen3", "template")
    template.render(ROUNDS, None, (), {"enable_thinkng": True})
    assert any("enable_thinkng" in note for note in template.notes)
    for name in ("messages", "tools", "add_generation_prompt", "tokenize", "strftime_now", "a b"):
        with pytest.raises(UserError, match=name):
            template.render(ROUNDS, None, (), {name: 1})
    with pytest.raises(UserError, match=r"chat template refuses|does not print|Unsupported"):
        template_for(trl_template("gptoss")).render(ROUNDS, None, (), {"builtin_tools": 3})


@pytest.mark.parametrize("value", ["enable_thinking=false", "[1]", '{"messages": []}', '{"enable_thinkng": true}', "{"])
def test_settings_that_the_template_does_not_take_are_refused(run: Run, value: str) -> None:
    with pytest.raises(UserError, match="TEMPLATE_KWARGS"):
        run([{"messages": ROUNDS}], "--template-kwargs", value)


DEFAULT = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
TOOL_USE = (
    "{%- if tools %}{{ '<|im_start|>system\\nFunctions: ' }}{%- for t in tools %}{{ t | tojson }}{%- endfor %}"
    "{{ '<|im_end|>\\n' }}{%- endif %}{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{{ m.content or '' }}"
    "{%- for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + c.function.arguments | tojson }}{%- endfor %}"
    "{{ '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
SEVERAL = [{"name": "default", "template": DEFAULT}, {"name": "tool_use", "template": TOOL_USE}]
WITH_TOOLS = {"messages": CALLING, "tools": WEATHER}


def test_conversations_with_functions_use_their_own_template(run: Run) -> None:
    manifest = run([WITH_TOOLS, {"messages": ROUNDS}], template=SEVERAL)
    expected = ['<call>get_weather{"city": "Paris"}' + END, "Yes." + END, "one" + END, "two" + END]
    assert sorted(manifest["trained"]) == sorted(expected)
    assert (manifest["chat_template"], manifest["tool_use_template"]) == (DEFAULT, TOOL_USE)
    assert manifest["chat_template_changed"] is False


def test_a_correction_of_the_template_for_functions_leaves_the_other() -> None:
    base = template_of("qwen3")
    template = ChatTemplate(base.tokenizer, DEFAULT, tool_text=base.text, empty_think="every")
    with pytest.raises(CorrectionNeeded) as needed:
        template.render(CALLING, WEATHER)
    assert needed.value.template == DEFAULT
    assert "not reasoning_content" in needed.value.tool_template
    assert trained(template, CALLING, WEATHER)[0] == NO_THOUGHT + HERMES
    assert trained(template, ROUNDS) == ["one" + END, "two" + END]


def test_a_chosen_template_replaces_all(run: Run, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(TOOL_USE)
    manifest = run([WITH_TOOLS], "--chat-template", str(tmp_path / "own.jinja"), template=SEVERAL)
    assert manifest["chat_template"] == manifest["tool_use_template"] == TOOL_USE


@pytest.mark.parametrize("in_files", [False, True], ids=["list", "files"])
def test_several_templates_are_written_to_where_they_are(tmp_path: Path, in_files: bool) -> None:
    folder = tmp_path / "model"
    shutil.copytree(smollm2_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if in_files:
        (folder / "additional_chat_templates").mkdir()
        (folder / "chat_template.jinja").write_text(DEFAULT)
        (folder / "additional_chat_templates/tool_use.jinja").write_text(TOOL_USE)
        (folder / "additional_chat_templates/rag.jinja").write_text("RAG")
    else:
        config["chat_template"] = [*SEVERAL, {"name": "rag", "template": "RAG"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder).chat_template == {"default": DEFAULT, "tool_use": TOOL_USE, "rag": "RAG"}
    assert read_named_template(folder, "tool_use") == TOOL_USE
    write_chat_template(folder, TOOL_USE + " ", "tool_use")
    write_chat_template(folder, DEFAULT + " ")
    expected = {"default": DEFAULT + " ", "tool_use": TOOL_USE + " ", "rag": "RAG"}
    assert load_tokenizer(folder).chat_template == expected
    assert read_named_template(folder, "tool_use") == TOOL_USE + " "
