"""Ids are tokenizer.json's, or sentencepiece's, whatever class transformers would choose for the folder."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, pre_tokenizers

from megatron.sft.chat.encoding import load_tokenizer
from megatron.sft.hf.tokenizer import auto_tokenizer_note
from megatron.sft.hf.tokenizer_files import num_tokens
from megatron.sft.runtime.errors import UserError
from tests.support.chat_material import mistral_tokenizer
from tests.support.material import npm_tokenizer, smollm2_folder

TEXT = "names  :\n  Zoe,Adam\n    12345  (x = 1)\n"


def folder_with(tmp_path: Path, model_type: str, tokenizer_class: str, digits: str = "") -> Path:
    """SmolLM2's tokenizer in a folder of another kind; `digits`: a pre-tokenizer that no class of transformers builds."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(smollm2_folder() / name, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": tokenizer_class}))
    if digits:
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        steps = [pre_tokenizers.Split(digits, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer", "NoSuchClass"])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral", "no_such_type"])
def test_no_class_rebuilds_the_tokenizer(tmp_path: Path, model_type: str, tokenizer_class: str) -> None:
    folder = folder_with(tmp_path, model_type, tokenizer_class, digits=" ")
    tokenizer = load_tokenizer(folder)
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT, add_special_tokens=False)
    assert tokenizer.backend_tokenizer.encode(TEXT, add_special_tokens=False).ids == expected.ids
    assert tokenizer(TEXT, add_special_tokens=False).input_ids == expected.ids
    assert tokenizer.decode(expected.ids) == TEXT
    assert (tokenizer.eos_token, tokenizer.name_or_path) == ("<|im_end|>", str(folder))


def test_where_auto_tokenizer_differs_is_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "qwen2", "PreTrainedTokenizerFast", digits="a")
    note = auto_tokenizer_note(folder, load_tokenizer(folder))
    if transformers.__version__.startswith("5."):
        assert str(folder) in note and "Qwen2Tokenizer" in note
    assert auto_tokenizer_note(smollm2_folder(), load_tokenizer(smollm2_folder())) == ""


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "deepseek_v3", "llama2"])
def test_published_tokenizers_have_the_ids_of_their_file(name: str) -> None:
    folder = npm_tokenizer(name)
    tokenizer = load_tokenizer(folder, template_needed=False)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (TEXT, " x", "<think>\n\n</think>", "a<|im_start|>b", "\u00a0½", ""):
        assert tokenizer(text, add_special_tokens=False).input_ids == file.encode(text, add_special_tokens=False).ids
    assert len(tokenizer) == num_tokens(folder) == file.get_vocab_size()


@pytest.mark.parametrize("added", [{}, {"<|im_start|>": 32768, "<|im_end|>": 32769}])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_model_alone_gives_sentencepieces_ids(tmp_path: Path, added: dict[str, int], legacy: bool) -> None:
    import sentencepiece

    shutil.copyfile(mistral_tokenizer() / "tokenizer.model", tmp_path / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages[0].content }}"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = load_tokenizer(tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in (TEXT, "你好  é½\t\n", "a", "x" * 50 + "  y"):
        assert tokenizer(text, add_special_tokens=False).input_ids == model.encode(text)
        assert tokenizer.decode(model.encode(text)) == text
    assert tokenizer("a").input_ids == [1, *model.encode("a")]
    assert len(tokenizer) == num_tokens(tmp_path) == 32768 + len(added)
    assert [tokenizer.convert_tokens_to_ids(token) for token in added] == list(added.values())


@pytest.mark.parametrize("content", [b"", b"not a model", b"IQ== 0\nIg== 1\n"])  # the last as tiktoken writes it
def test_a_file_that_is_not_sentencepieces_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model is not a sentencepiece model .*add the tokenizer\.json"):
        load_tokenizer(tmp_path, template_needed=False)
