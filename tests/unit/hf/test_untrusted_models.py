"""Models, templates, data sets and hub repositories made to do harm: nothing of theirs is run or leaves its folder."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest

from megatron.sft import convert
from megatron.sft.chat import template_sandbox
from megatron.sft.chat.encoding import load_tokenizer
from megatron.sft.chat.template import ChatTemplate
from megatron.sft.hf import hub
from megatron.sft.runtime.errors import UserError
from tests.support import malicious, tiny


def model_with_code(source: Path, folder: Path, mark: Path) -> Path:
    """A model folder that brings Python files and asks for them in every place where transformers looks."""
    shutil.copytree(source, folder)
    code = (
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import Qwen2Config as EvilConfig, Qwen2ForCausalLM as EvilModel, "
        "PreTrainedTokenizerFast as EvilTokenizer\n"
    )
    for name in ("evil.py", "modeling_evil.py", "configuration_evil.py", "__init__.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    classes = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    malicious.write_json(folder / "config.json", auto_map=classes, custom_pipelines={"x": {"impl": "evil.EvilModel"}})
    (folder / "generation_config.json").write_text(json.dumps({"custom_generate": str(folder)}))
    return folder


def test_a_models_own_code_is_not_run(tiny_qwen2: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.sft.inference.chat_model import load_chat_model

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = model_with_code(tiny_qwen2, tmp_path / "model", mark)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny.ROOT / "assets" / "quickstart" / name, folder)
    malicious.write_json(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]},
        tokenizer_class="EvilTokenizer",
    )
    for use in (
        lambda: malicious.call_main(monkeypatch, convert.main, "--source", folder, "--output", tmp_path / "converted"),
        lambda: load_tokenizer(folder),
        lambda: load_chat_model(folder),
    ):
        with contextlib.suppress(UserError):  # refused or read without the code, as the case may be
            use()
    assert not mark.exists()


@pytest.mark.parametrize("name", [*malicious.templates(Path("mark")), *malicious.template_bombs()])
def test_a_chat_template_reaches_nothing_and_takes_little(
    name: str, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_sandbox, "SECONDS", 2)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny.ROOT / "assets" / "quickstart" / file, folder)
    template_sandbox.check_template.cache_clear()
    text = {**malicious.templates(mark), **malicious.template_bombs()}[name]
    (folder / "chat_template.jinja").write_text(text)
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    with pytest.raises(UserError, match="template"):
        ChatTemplate(load_tokenizer(folder)).render(messages)


def test_real_chat_templates_pass_the_trial() -> None:
    for path in (tiny.ROOT / "megatron/sft/chat/templates").glob("*.jinja"):
        template_sandbox.check_template(path.read_text())
    template_sandbox.check_template((tiny.ROOT / "assets/quickstart/chat_template.jinja").read_text())


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
def test_weights_that_are_a_pickle_are_not_loaded(
    weights: str, tiny_qwen2: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.sft.inference.chat_model import load_chat_model

    folder = tmp_path / "model"
    shutil.copytree(tiny_qwen2, folder)
    (folder / "model.safetensors").unlink()
    malicious.save_reduced(folder / weights, mark)
    with pytest.raises(UserError):
        malicious.call_main(monkeypatch, convert.main, "--source", folder, "--output", tmp_path / "converted")
    with pytest.raises(UserError):
        load_chat_model(folder)


def test_a_data_folder_that_is_a_program_is_not_run(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.sft import download

    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("rows.py", "dataset.py", "__init__.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w').close()\n")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: '../../*'\n---\n")
    with pytest.raises(UserError):
        malicious.call_main(monkeypatch, download.main, "dataset", folder, "--assets-dir", tmp_path / "assets")


@pytest.mark.parametrize("name", ["../outside.json", "a/../../outside", "/tmp/outside", "a//../../x", "a\0b", ".."])
def test_names_that_a_hub_gives_stay_in_the_folder(name: str) -> None:
    with pytest.raises(UserError, match="lies outside"):
        hub.check_names("model", "owner/name", [name])
    hub.check_names("model", "owner/name", ["config.json", "sub/model.safetensors", "..well.txt"])
