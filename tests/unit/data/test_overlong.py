"""What becomes of conversations that are longer than a row: OVERLONG=drop, truncate, split, error."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron.sft import tokenize
from megatron.sft.chat.conversations import RecordReader
from megatron.sft.chat.encoding import load_tokenizer
from megatron.sft.chat.template import ChatTemplate
from megatron.sft.data.corpus import Corpus
from megatron.sft.data.mixture import Input, Source
from megatron.sft.data.sources import SourceRecord
from megatron.sft.data.tokenized import TokenizedRows
from megatron.sft.runtime.errors import UserError
from tests.support.material import npm_tokenizer, smollm2_folder

TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "Looks up", "parameters": {}}}]


@cache
def tokenizer_of(name: str) -> Any:
    return load_tokenizer(smollm2_folder() if name == "SmolLM2" else npm_tokenizer(name))


class Records(Source):
    """Records in memory."""

    def records(self, seed: int, index: int) -> Any:
        return (SourceRecord(line, fields, line, self.input.path) for line, fields in enumerate(RECORDS[self.sha256], start=1))


RECORDS: dict[str, list[dict[str, Any]]] = {}


def kept(
    rows: list[dict[str, Any]], length: int, overlong: str, name: str = "SmolLM2", train_on: str = "all_assistant"
) -> tuple[list[str], Corpus]:
    """The texts of the conversations that are kept, trained parts in [[ ]]."""
    RECORDS["records"] = rows
    template = ChatTemplate(tokenizer_of(name), train_on=train_on)
    corpus = Corpus(Records(Input("records"), "records", "records", 1), template, RecordReader(), length, overlong)
    texts = []
    for (encoded,) in corpus:
        assert len(encoded.tokens) <= length
        assert encoded.num_trained
        text, position = "", 0
        for index, run in enumerate(encoded.mask_run_lengths):
            piece = template.tokenizer.decode(encoded.tokens[position : position + run])
            text += f"[[{piece}]]" if index % 2 else piece
            position += run
        texts.append(text)
    counts = corpus.counts
    assert counts.num_read == counts.num_kept + sum(counts.dropped.values())
    return texts, corpus


def conversation(num_rounds: int, words: int = 5, system: str = "Be brief.", **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}]
    for number in range(num_rounds):
        messages.append({"role": "user", "content": f"question {number}" + " word" * words})
        messages.append({"role": "assistant", "content": f"answer {number}" + " word" * words})
    return {"messages": messages} | more


def test_a_split_keeps_every_round_once_and_repeats_the_system_text() -> None:
    texts, corpus = kept([conversation(10)], 100, "split")
    assert len(texts) > 2
    for number in range(10):
        assert sum(text.count(f"[[answer {number} word word word word word<|im_end|>]]") for text in texts) == 1
        assert sum(text.count(f"question {number} ") for text in texts) == 1
    assert all(text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n") for text in texts)
    assert corpus.counts.num_kept == 1 == corpus.counts.num_split
    assert corpus.counts.num_parts == len(texts)


def test_a_split_fills_the_length_before_it_begins_another_part() -> None:
    rows, _ = kept([conversation(3)], 1000, "drop")
    length = len(tokenizer_of("SmolLM2")(rows[0].replace("[[", "").replace("]]", "")).input_ids)
    for cut, expected in ((length, [3, 2]), (length - 1, [2, 2, 1]), (length + 5, [3, 2])):
        texts, _ = kept([conversation(5)], cut, "split")
        assert [text.count("[[") for text in texts] == expected


def test_a_split_repeats_the_functions() -> None:
    row = conversation(6, tools=TOOLS)
    texts, _ = kept([row], 220, "split", "qwen3")
    assert len(texts) > 1
    assert all(text.count('"name": "look_up"') == 1 for text in texts)


def test_a_round_that_is_too_long_by_itself_is_skipped_and_counted() -> None:
    row = conversation(3)
    row["messages"][4]["content"] = "long " * 200
    texts, corpus = kept([row], 80, "split")
    assert "".join(texts).count("[[") == 2
    assert corpus.counts.num_parts_dropped == 1
    alone, dropped = kept([conversation(1, words=200)], 80, "split")
    assert not alone
    assert dropped.counts.dropped == {"longer than 80 tokens in every round of question and answer": 1}


def test_of_a_split_conversation_the_last_answer_is_still_the_last() -> None:
    texts, corpus = kept([conversation(10)], 100, "split", train_on="last_assistant")
    assert len(texts) == 1
    assert texts[0].count("[[") == 1
    assert "[[answer 9 word" in texts[0]
    assert corpus.counts.num_parts_dropped > 0


def test_a_long_text_is_split_into_pieces_that_lose_nothing() -> None:
    text = " ".join(f"word{index}" for index in range(500))
    texts, _ = kept([{"text": text}], 64, "split")
    assert "".join(texts).replace("[[", "").replace("]]", "").removesuffix("<|im_end|>") == text


def test_truncation_never_invents_an_end_token() -> None:
    texts, corpus = kept([conversation(10), {"text": "word " * 100}], 60, "truncate")
    assert len(texts) == 2 == corpus.counts.num_truncated
    assert all(not text.endswith("<|im_end|>]]") for text in texts)


def test_a_row_without_a_trained_token_is_dropped_and_counted() -> None:
    for overlong in ("drop", "truncate", "split", "error"):
        row = conversation(1)
        row["messages"][2]["loss"] = 0
        texts, corpus = kept([row, conversation(1)], 100, overlong)
        assert len(texts) == 1
        assert corpus.counts.dropped == {"no turn of it is trained": 1}


def test_an_error_names_the_row_and_the_choices() -> None:
    with pytest.raises(UserError, match=r"records, line 2: the conversation has \d+ tokens.*OVERLONG=drop, truncate or split"):
        kept([conversation(1), conversation(10)], 60, "error")


@pytest.mark.parametrize("overlong", ["drop", "truncate", "split"])
def test_the_summary_gives_lengths_before_anything_was_cut(
    overlong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    rows = [[{"role": "user", "content": "a" + " a" * size}, {"role": "assistant", "content": "b"}] for size in (1, 5000, 9000)]
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    arguments = ["--tokenizer", str(smollm2_folder()), "--input", str(data), "--seq-length", "6000", "--overlong", overlong]
    for _ in range(2):  # the second time it is already there
        assert tokenize.main([*arguments, "--num-workers", "1", "--output-prefix", str(tmp_path / "rows")]) == 0
        output = capsys.readouterr().out
        assert "longer than 4k: 66.7 %, 8k: 33.3 %, 16k: 0.0 %, 32k: 0.0 %" in output
    facts = TokenizedRows(tmp_path / "rows").manifest["read_lengths"]
    assert facts["conversations"] == 3 and facts["longest"] - facts["shortest"] == 8999
    assert facts["mean"] == pytest.approx(facts["shortest"] + (4999 + 8999) / 3)
    assert facts["longer_than"] == {"4096": 2, "8192": 1, "16384": 0, "32768": 0}
