"""Encoding word by word from memory: the library's own ids and offsets, for every text, or it is not used."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.sft.chat.bpe_cache import Encoding, WordEncoder, ascii_pattern, cutting_pattern, word_encoder
from megatron.sft.chat.encoding import load_tokenizer
from tests.support.material import npm_tokenizer, reasoning_gym_rows, smollm2_folder

KNOWN = ("smollm2", "qwen3", "llama3_1")
WORDS = ("it's", "WE'LL", " ", "  ", "\n", "\r\n", "\t", "é", "数学", "😀", "1234567", "a_b", "?!", "\x00")
PIECES = (*WORDS, "<|im_end|>", "<|im_start|>", "<|")


def folder_of(name: str) -> Path:
    return smollm2_folder() if name == "smollm2" else npm_tokenizer(name)


@pytest.fixture(scope="module", params=KNOWN)
def pair(request: pytest.FixtureRequest) -> tuple[object, WordEncoder]:
    tokenizer = load_tokenizer(folder_of(request.param), template_needed=False)
    encoder = word_encoder(tokenizer)
    assert encoder is not None
    return tokenizer.backend_tokenizer, encoder


ascii_text = st.text(st.characters(max_codepoint=127), max_size=12)
texts = st.lists(st.one_of(st.text(max_size=12), ascii_text, st.sampled_from(PIECES)))


@settings(max_examples=300, deadline=None)
@given(parts=texts)
def test_ids_and_offsets_are_the_librarys(pair: tuple[object, WordEncoder], parts: list[str]) -> None:
    backend, encoder = pair
    text = "".join(parts)
    expected = backend.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]
    (found,) = encoder.encode_batch([text])
    assert list(found.ids) == expected.ids
    for token in range(len(expected.ids)):
        assert found.token_to_chars(token) == expected.token_to_chars(token)
    for character in range(len(text)):
        assert found.char_to_token(character) == expected.char_to_token(character)


def test_a_tokenizer_that_is_cut_in_another_way_is_left_to_the_library() -> None:
    tokenizer = load_tokenizer(npm_tokenizer("deepseek_v3"))  # three patterns, one after another
    assert word_encoder(tokenizer) is None


def test_an_encoder_that_does_not_agree_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(folder_of("smollm2"))
    monkeypatch.setattr("megatron.sft.chat.bpe_cache.cutting_pattern", lambda description: r"\S+|\s+")
    assert word_encoder(tokenizer) is None


def test_settings_that_change_what_words_are_make_it_unknown() -> None:
    description = json.loads((folder_of("qwen3") / "tokenizer.json").read_text())
    assert cutting_pattern(description) is not None
    changes = {
        "model": {"dropout": 0.1},
        "normalizer": {"type": "NFKC"},
        "pre_tokenizer": {"type": "Whitespace", "pretokenizers": []},
    }
    for name, change in changes.items():
        assert cutting_pattern(description | {name: description[name] | change}) is None
    assert ascii_pattern(r"\p{P}+") is None
    assert ascii_pattern(r"(a)b") is None
    assert ascii_pattern(r"[^\p{L}\n]?\p{L}+") == r"[^A-Za-z\n]?[A-Za-z]+"


def test_offsets_are_looked_up_by_character() -> None:
    encoding = Encoding(np.array([5, 6, 7]), np.array([0, 2, 5]), np.array([2, 4, 6]))
    assert [encoding.char_to_token(character) for character in range(7)] == [0, 0, 1, 1, None, 2, None]
    assert encoding.token_to_chars(1) == (2, 4)


def test_the_files_are_the_same_with_it_and_without_whatever_the_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.sft import tokenize

    rows = reasoning_gym_rows(900)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row | {"system": "Déjà vu 数"}) + "\n" for row in rows))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    results = []
    for least_bytes, num_workers in ((1 << 40, 1), (0, 1), (0, 2), (0, 4)):
        monkeypatch.setattr("megatron.sft.data.corpus.BYTES_FOR_WORDS", least_bytes)
        prefix = tmp_path / f"{least_bytes}-{num_workers}"
        arguments = ["--tokenizer", str(smollm2_folder()), "--input", str(tmp_path / "data.jsonl"), "--seq-length", "512"]
        arguments += ["--num-workers", str(num_workers), "--output-prefix", str(prefix)]
        assert tokenize.main(arguments) == 0
        results.append([Path(f"{prefix}.{ending}").read_bytes() for ending in ("bin", "idx")])
    assert results[0] == results[1] == results[2] == results[3]
