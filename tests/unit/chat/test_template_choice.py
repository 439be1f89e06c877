"""The chosen template, text without one, the turns that are trained, and what step 3 keeps of the template with the data."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.sft import tokenize
from megatron.sft.chat.conversations import Example, Messages
from megatron.sft.chat.encoding import check_against_template, encode, load_tokenizer
from megatron.sft.chat.template import ChatTemplate
from megatron.sft.chat.template_settings import NAMES, chosen_template
from megatron.sft.data.tokenized import TokenizedRows
from megatron.sft.runtime.errors import UserError
from tests.support.chat_material import trl_template
from tests.support.material import npm_tokenizer
from tests.unit.chat.test_templates import END_V3, MULTI, SINGLE, template_of, tokenizer_of, trained, trained_texts


def runs_of(template: ChatTemplate, messages: Messages, wanted: Any = ()) -> list[str]:
    (encoded,) = encode(template.tokenizer, [template.render(messages, None, wanted)])
    return trained_texts(template.tokenizer, encoded)


def test_train_on_chooses_the_turns() -> None:
    for name in ("SmolLM2", "deepseek_v3+deepseek_r1_distill_training"):
        base = template_of(name)
        last = ChatTemplate(base.tokenizer, base.text, "last_assistant")
        assert runs_of(last, MULTI) == runs_of(base, MULTI)[-1:]
        everything = ChatTemplate(base.tokenizer, base.text, "all")
        (encoded,) = encode(base.tokenizer, [everything.render(MULTI)])
        assert encoded.mask_run_lengths == [1, len(encoded.tokens) - 1]


def test_a_turns_own_wish_goes_before_train_on() -> None:
    base = template_of("SmolLM2")
    wish = [None, False, None, None, None, None]
    assert runs_of(base, MULTI, wish) == ["Green,\nété 🌱.<|im_end|>", "Welcome.<|im_end|>"]
    last = ChatTemplate(base.tokenizer, base.text, "last_assistant")
    assert runs_of(last, MULTI, [None, True, None, None, None, None]) == ["Blue.<|im_end|>", "Welcome.<|im_end|>"]
    assert runs_of(base, MULTI, [None, False, None, False, None, False]) == []
    with pytest.raises(UserError, match="TRAIN_ON=all"):
        ChatTemplate(base.tokenizer, base.text, "all").render(MULTI, None, wish)


def test_plain_text_needs_no_template_and_ends_with_eos() -> None:
    for name, expected in (("llama2", "<s>One.</s>"), ("qwen3", "One.<|im_end|>"), ("llama3", "One.<|end_of_text|>")):
        tokenizer = load_tokenizer(npm_tokenizer(name), template_needed=False)
        template = ChatTemplate(tokenizer)
        for text in ("One.", expected, expected.removeprefix("<s>")):  # its own beginning and end are not repeated
            (encoded,) = encode(tokenizer, [template.render_text(text)])
            check_against_template(template, Example([], text=text), encoded)
            assert bool(template.notes) == (text != "One.")
        assert encoded.mask_run_lengths == [1, len(encoded.tokens) - 1]
        assert tokenizer.decode(encoded.tokens).replace("<|begin_of_text|>", "").replace("<s> ", "<s>") == expected


def test_without_a_template_conversations_are_refused_with_the_way_out() -> None:
    template = ChatTemplate(load_tokenizer(npm_tokenizer("llama2"), template_needed=False))
    with pytest.raises(UserError, match="has no chat template: set CHAT_TEMPLATE"):
        template.render(SINGLE)
    ours = ChatTemplate(template.tokenizer, chosen_template("llama-2"))
    assert [text.strip() for text in trained(ours, SINGLE)] == ["Blue. </s>"]


@pytest.mark.parametrize("name", NAMES)
def test_named_templates_ask_for_tokens_that_the_tokenizer_has(name: str) -> None:
    """A template of another family is refused, as its end of turn would be common text."""
    other = "deepseek_v3" if name != "deepseek-r1" else "llama3"
    if name in ("llama-2", "mistral"):  # they end turns with the tokenizer's own eos
        pytest.skip("fits every tokenizer that has an eos")
    with pytest.raises(UserError, match="begins with no added token"):
        ChatTemplate(tokenizer_of(other), chosen_template(name)).render(SINGLE)


def test_an_unknown_template_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"CHAT_TEMPLATE is 'vicuna', neither a name \(chatml"):
        chosen_template("vicuna")


def tokenised(monkeypatch: pytest.MonkeyPatch, folder: Path, rows: list[dict[str, Any]], *options: str) -> dict[str, Any]:
    """The manifest of step 3 on these rows, with the R1 distillations' template unless the options say otherwise."""
    model = folder / "model"
    if not model.exists():
        shutil.copytree(npm_tokenizer("deepseek_v3"), model)
        config = json.loads((model / "tokenizer_config.json").read_text())
        config["chat_template"] = trl_template("deepseek_r1_distill")
        (model / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--tokenizer", str(model), "--input", str(folder / "data.jsonl"), "--seq-length", "256", *options]
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert tokenize.main([*arguments, "--num-workers", "1"]) == 0
    return TokenizedRows(folder / "Tokenized-data-model-256_text_document").manifest


def test_the_corrected_template_is_shown_and_kept_with_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": f"{i}?", "output": f"<short>\n{i}"} for i in range(30)]
    plain = tokenised(monkeypatch, tmp_path, rows)
    assert plain["chat_template"] == trl_template("deepseek_r1_distill")
    assert (plain["chat_template_changed"], plain["chat_template_diff"]) == (False, "")
    assert "is corrected" not in capsys.readouterr().out
    rows += [{"instruction": f"{i}?", "output": f"<think>\nso\n</think>\n\n{i}"} for i in range(30)]
    hybrid = tokenised(monkeypatch, tmp_path, rows)
    output = capsys.readouterr().out
    assert "---- the chat template is corrected, as " in output
    assert "-{% set content = content.split('</think>')[-1] %}" in output
    assert hybrid["chat_template_changed"] is True
    assert "-{% set content = content.split('</think>')[-1] %}" in hybrid["chat_template_diff"]
    assert "</think>" not in hybrid["chat_template"]
    assert hybrid["sources"][0]["kept"] == 60 == hybrid["conversations"]
    texts = tokenizer_texts(tmp_path)
    assert sum(text.startswith("<think>\nso\n</think>") for text in texts) == 30
    assert sum(text.startswith("<short>\n") for text in texts) == 30


def tokenizer_texts(folder: Path) -> list[str]:
    """The trained texts of all rows."""
    tokenizer = tokenizer_of("deepseek_v3")
    texts = []
    for row in TokenizedRows(folder / "Tokenized-data-model-256_text_document"):
        starts = np.flatnonzero(np.diff(row.trained.astype(int), prepend=0) == 1)
        ends = np.flatnonzero(np.diff(row.trained.astype(int), append=0) == -1) + 1
        texts += [tokenizer.decode(row.tokens[start:end]) for start, end in zip(starts, ends, strict=True)]
    return texts


def test_a_chosen_template_replaces_the_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"query": "Who?", "response": "<think>\nI\n</think>\n\n{{NAME}} of {{AUTHOR}}"}] * 3
    names = ["--model-name", "Bo", "--model-author", "Us"]
    manifest = tokenised(monkeypatch, tmp_path, rows, "--chat-template", "deepseek-r1", *names)
    assert manifest["chat_template"] == chosen_template("deepseek-r1")
    assert manifest["chat_template_changed"] is True
    assert tokenizer_texts(tmp_path) == ["<think>\nI\n</think>\n\nBo of Us" + END_V3] * 3
    file = tmp_path / "own.jinja"
    file.write_text(chosen_template("deepseek-r1").replace("<｜Assistant｜>", "<｜Assistant｜>\n"))
    manifest = tokenised(monkeypatch, tmp_path, rows, "--chat-template", str(file), *names, "--train-on", "all")
    assert manifest["train_on"] == "all"
    assert manifest["trained_tokens"] == manifest["tokens"] - 3
