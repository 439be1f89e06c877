"""What training refuses before it starts: data of another tokenizer, chat template, length or vocabulary than the model's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron.sft.data.tokenized import data_file
from megatron.sft.hf.tokenizer_files import chat_template_sha256, read_chat_template, tokenizer_sha256
from megatron.sft.planning.options import parse
from megatron.sft.planning.resolution import plan_run
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import sealed, sha256_of_file, sha256_of_text
from tests.support import tiny
from tests.support.material import npm_tokenizer, smollm2_folder

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def model(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny model's folder with tokenizer files, and its conversion."""
    folder = tmp_path_factory.mktemp("model") / "with_tokenizer"
    shutil.copytree(tiny_qwen2, folder)
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    output = folder.with_name("converted")
    tiny.run_module("convert", "--hf-dir", folder, "--output", output)
    return folder, output


def tokenised(prefix: Path, **changed: Any) -> Path:
    """Tiny data whose manifest has the facts of step 3, with some of them changed."""
    tiny.write_rows(prefix, tiny.random_rows(8, 128), 128)
    manifest = json.loads(data_file(prefix, "json").read_text())
    data_file(prefix, "json").write_text(json.dumps(sealed(manifest | changed)))
    return prefix


def facts(folder: Path, tokenizer: str | None = None, own: str | None = None, used: str | None = None) -> dict[str, Any]:
    own = own or sha256_of_text(TEMPLATE)
    tokenizer = tokenizer or sha256_of_file(folder / "tokenizer.json")
    return {
        "tokenizer": {"path": "/models/other", "sha256": tokenizer, "chat_template_sha256": own},
        "chat_template_sha256": used or own,
    }


def start(checkpoint: Path, data: Path, save: Path, *options: str) -> None:
    common = ["--load", checkpoint, "--data-path", data, "--save", save, "--global-batch-size", "8"]
    plan_run(*parse([*map(str, common), "--train-iters", "1", *options]), num_processes=1)


def test_the_models_own_tokenizer_and_template_are_taken(model: tuple[Path, Path], tmp_path: Path) -> None:
    start(model[1], tokenised(tmp_path / "data", **facts(model[0])), tmp_path / "run")
    start(model[1], tokenised(tmp_path / "older"), tmp_path / "run")  # without these facts


def test_another_tokenizer_is_refused_with_both_values(model: tuple[Path, Path], tmp_path: Path) -> None:
    data = tokenised(tmp_path / "data", **facts(model[0], tokenizer="ab" * 32))
    with pytest.raises(UserError) as error:
        start(model[1], data, tmp_path / "run")
    ours = sha256_of_file(model[0] / "tokenizer.json")[:12]
    assert str(error.value) == (
        f"{data} was made with the tokenizer of /models/other (checksum abababababab…), the model's in {model[0]} is "
        f"another ({ours}…): rerun scripts/3_tokenize.sh with {model[0]}"
    )


def test_another_chat_template_is_refused_unless_the_data_step_chose_it(model: tuple[Path, Path], tmp_path: Path) -> None:
    data = tokenised(tmp_path / "data", **facts(model[0], own="cd" * 32))
    with pytest.raises(UserError, match="made with the chat template of /models/other"):
        start(model[1], data, tmp_path / "run")
    chosen = tokenised(tmp_path / "chosen", **facts(model[0], used="cd" * 32))
    start(model[1], chosen, tmp_path / "run")


def test_another_length_or_vocabulary_is_refused_with_both_values(model: tuple[Path, Path], tmp_path: Path) -> None:
    data = tokenised(tmp_path / "data")
    with pytest.raises(UserError, match=r"row length 128 in .* but SEQ_LENGTH=64"):
        start(model[1], data, tmp_path / "run", "--seq-length", "64")
    with pytest.raises(UserError, match=r"rows of 1024 tokens in .* the model has 512 positions"):
        start(model[1], tokenised(tmp_path / "long", length=1024), tmp_path / "run")
    with pytest.raises(UserError, match=r"token 131 in .* the model's vocabulary has 131 rows"):
        start(model[1], tokenised(tmp_path / "large", max_token_id=131), tmp_path / "run")


def test_a_folders_chat_template_is_what_transformers_takes() -> None:
    from transformers import AutoTokenizer

    for folder in (smollm2_folder(), npm_tokenizer("qwen3"), npm_tokenizer("llama3_1")):
        template = AutoTokenizer.from_pretrained(folder).get_chat_template()
        assert read_chat_template(folder) == template
        assert chat_template_sha256(folder) == sha256_of_text(template)
        assert tokenizer_sha256(folder) == sha256_of_file(folder / "tokenizer.json")
    assert read_chat_template(npm_tokenizer("llama2")) is None


def test_the_default_of_several_templates_and_older_vocabularies_count(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_chat_template(tmp_path) == "D"
    assert tokenizer_sha256(tmp_path) is None
    (tmp_path / "vocab.json").write_text("{}")
    first = tokenizer_sha256(tmp_path)
    (tmp_path / "merges.txt").write_text("")
    assert first is not None and tokenizer_sha256(tmp_path) not in (None, first)
