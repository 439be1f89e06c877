"""The edit that hybrid reasoning needs: a control token in place of an unused one, and a template that keeps the thinking."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.support import tiny

SHORT_ID = 6
R1_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{bos_token}}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer in the form of DeepSeek-R1-Distill-Qwen's: template in tokenizer_config.json, an unused <|quad_start|>."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_tokens([AddedToken(t, special="think" not in t, normalized=False) for t in (*SPECIAL, "<|quad_start|>")])
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        tokenizer.add_tokens([AddedToken(letter, normalized=False)])
    out = tmp_path / "model"
    out.mkdir()
    tokenizer.save(str(out / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {
        str(token["id"]): {"content": token["content"], **flags, "special": token["special"]}
        for token in json.loads((out / "tokenizer.json").read_text())["added_tokens"]
    }
    config = {"added_tokens_decoder": decoder, "bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[1]}
    config |= {"chat_template": R1_TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512}
    config |= {"additional_special_tokens": ["<｜User｜>", "<|quad_start|>"]}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))
    special = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "additional_special_tokens": ["<|quad_start|>"]}
    (out / "special_tokens_map.json").write_text(json.dumps(special, ensure_ascii=False))
    (out / "added_tokens.json").write_text(json.dumps({"<|quad_start|>": SHORT_ID}))
    return out


def _content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_the_control_token_and_the_template_of_hybrid_reasoning(folder: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    before = _content(folder)
    command = ["edit_tokenizer", folder, "--rename", "<|quad_start|>=<short>", "--keep-thinking"]
    output = tiny.run_module(*command)
    assert '-      "content": "<|quad_start|>"' in output and '+      "content": "<short>"' in output
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"][str(SHORT_ID)] == {
        "content": "<short>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": False,
    }
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    assert {"id": SHORT_ID, "content": "<short>", "special": False}.items() <= tokens[SHORT_ID].items()
    assert "quad_start" not in "".join(text for name, text in _content(folder).items() if not name.endswith(".orig"))
    assert json.loads((folder / "added_tokens.json").read_text()) == {"<short>": SHORT_ID}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("<short>a", add_special_tokens=False)[0] == SHORT_ID
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("<short>").ids == [SHORT_ID]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nt\n</think>a"}]
    rendered = tokenizer.apply_chat_template([*turns, turns[0]], tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<｜User｜>q<｜Assistant｜>") and "<｜Assistant｜><think>\nt\n</think>a<｜end" in rendered
    assert {name.removesuffix(".orig"): text for name, text in _content(folder).items() if name.endswith(".orig")} == before
    once = _content(folder)
    assert "nothing to change" in tiny.run_module(*command)
    assert _content(folder) == once


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--rename", "<|nothing|>=<short>"], "has no added token '<|nothing|>'"),
        (["--rename", "<|quad_start|>=<think>"], "already has a token '<think>'"),
        (["--rename", "<｜User｜>=<short>"], "is in use (the chat template)"),
        (["--rename", "<｜end▁of▁sentence｜>=<short>"], "is in use (eos_token in tokenizer_config.json, pad_token"),
        (["--rename", "<|quad_start|>"], "is not OLD=NEW"),
        (["--template", "nowhere.jinja"], "(chatml, llama-2"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_changed(folder: Path, options: list[str], reason: str) -> None:
    before = _content(folder)
    output = tiny.run_module("edit_tokenizer", folder, *options, status=2)
    assert output.startswith("error: ") and output.count("\n") == 1 and reason in output
    assert _content(folder) == before


def test_a_template_that_treats_thinking_otherwise_is_refused(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = R1_TEMPLATE.replace("content.split('</think>')[-1]", "content | upper")
    path.write_text(json.dumps(config))
    assert "--template FILE" in tiny.run_module("edit_tokenizer", folder, "--keep-thinking", status=2)
    assert not list(folder.glob("*.orig"))


def test_a_template_goes_where_the_folder_keeps_its_own(folder: Path) -> None:
    tiny.run_module("edit_tokenizer", folder, "--template", "chatml")
    assert "<|im_start|>" in json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert not (folder / "chat_template.jinja").exists()
    (folder / "chat_template.jinja").write_text(R1_TEMPLATE)
    tiny.run_module("edit_tokenizer", folder, "--keep-thinking")
    assert "split('</think>')" not in (folder / "chat_template.jinja").read_text()
    assert "<|im_start|>" not in json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]


def test_an_added_token_gets_its_own_row(folder: Path, tiny_qwen2_tied: Path, tmp_path: Path) -> None:
    """A tokenizer of 263 tokens on a model of 131 rows: the rest, the two added ones included, are new rows."""
    import torch

    model = tmp_path / "grown"
    shutil.copytree(tiny_qwen2_tied, model)
    for path in folder.iterdir():
        shutil.copyfile(path, model / path.name)
    output = tiny.run_module("edit_tokenizer", model, "--add-token", "<a>", "--add-token", "<b>")
    assert "<b> is added (id 264): scripts/2_convert.sh adds a row for it" in output
    output = tiny.run_module("convert", "--source", model, "--output", tmp_path / "out", "--verify", "1")
    assert "the tokenizer has 134 tokens more" in output and "verified: logits as transformers'" in output
    output = tiny.run_module("export", "--load", tmp_path / "out", "--hf-dir", model, "--output", tmp_path / "hf")
    assert re.search(r"vocab_size .*\b265\b", output)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 265
    name = "model.embed_tokens.weight"
    new, old = tiny.tensors(tmp_path / "hf")[name], tiny.tensors(model)[name]
    assert isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor)
    assert torch.equal(new[:131], old) and len(new.unique(dim=0)) == 265
    assert (new[131:] - old.mean(0)).abs().max() < 0.6 * old.std()
