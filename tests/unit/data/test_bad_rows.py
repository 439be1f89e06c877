"""Records that cannot be used: each is reported with file, line, field and fix; none is lost, none is trained silently."""

import gzip
import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron.sft import tokenize
from megatron.sft.chat.conversations import RecordReader
from megatron.sft.chat.encoding import load_tokenizer
from megatron.sft.chat.template import ChatTemplate
from megatron.sft.data.corpus import Corpus
from megatron.sft.data.mixture import parse_inputs, validated_source
from megatron.sft.data.report import RejectedRecords
from megatron.sft.data.tokenized import TokenizedRows
from megatron.sft.runtime.errors import UserError, run
from tests.support.material import smollm2_folder

Record = dict[str, Any]
MAKERS: dict[str, Callable[[int], Record]] = {
    "instruction": lambda i: {"instruction": f"q{i}", "output": f"a{i}"},
    "alpaca": lambda i: {"instruction": f"q{i}", "input": "x", "output": f"a{i}", "history": [["b", "c"]]},
    "query": lambda i: {"query": f"q{i}", "response": f"a{i}"},
    "prompt": lambda i: {"prompt": f"q{i}", "completion": f"a{i}"},
    "text": lambda i: {"text": f"t{i}"},
    "messages": lambda i: {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]},
    "sharegpt": lambda i: {"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}]},
    "codeact": lambda i: {
        "id": str(i),
        "conversations": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}],
    },
}
ANSWER_FIELD = {"instruction": "output", "alpaca": "output", "query": "response", "prompt": "completion", "text": "text"}


def answer_holder(kind: str, row: Record) -> tuple[Record, str]:
    """The object that holds the answer's text, and its field."""
    if kind in ANSWER_FIELD:
        return row, ANSWER_FIELD[kind]
    return row[next(name for name in ("messages", "conversations") if name in row)][-1], (
        "value" if kind == "sharegpt" else "content"
    )


def with_answer(value: Any) -> Callable[[str, Record], bytes]:
    def spoil(kind: str, row: Record) -> bytes:
        holder, name = answer_holder(kind, row)
        holder[name] = value
        return json.dumps(row).encode()

    return spoil


def without_answer(kind: str, row: Record) -> bytes:
    holder, name = answer_holder(kind, row)
    del holder[name]
    return json.dumps(row).encode()


def twice(kind: str, row: Record) -> bytes:
    name = next(iter(row))
    return json.dumps(row).encode()[:-1] + f', "{name}": {json.dumps(row[name])}}}'.encode()


def of_two_formats(kind: str, row: Record) -> bytes:
    more: Record = {"text": "t"} if kind != "text" else {"messages": []}
    return json.dumps(row | more).encode()


def out_of_order(kind: str, row: Record) -> bytes:
    for name in ("messages", "conversations"):
        if name in row:
            row[name] = row[name][::-1]
            return json.dumps(row).encode()
    return json.dumps({"messages": [{"role": "user", "content": "alone"}]}).encode()


SPOILERS: dict[str, Callable[[str, Record], bytes]] = {
    "cut short": lambda kind, row: json.dumps(row).encode()[:-3],
    "no quotes": lambda kind, row: json.dumps(row).encode().replace(b'"', b"'"),
    "not UTF-8": lambda kind, row: json.dumps(row).encode().replace(b"a", b"\xff\xfe", 1).replace(b"t", b"\xe9", 1),
    "lone surrogate": with_answer("\ud83d"),
    "not a number": with_answer(float("nan")),
    "number": with_answer(3),
    "true": with_answer(True),
    "null": with_answer(None),
    "object": with_answer({"a": 1}),
    "list": with_answer(["a"]),
    "empty": with_answer(""),
    "blank": with_answer(" \n\t"),
    "NUL": with_answer("a\0b"),
    "raw NUL": lambda kind, row: json.dumps(row).encode().replace(b'": ', b'": \0', 1),
    "missing": without_answer,
    "twice": twice,
    "two formats": of_two_formats,
    "order": out_of_order,
    "no fields": lambda kind, row: b"{}",
    "other fields": lambda kind, row: json.dumps({"question": "q", "answer": "a"}).encode(),
    "no object": lambda kind, row: json.dumps(list(row)).encode(),
    "bare text": lambda kind, row: b'"text"',
    "too deep": lambda kind, row: b'{"instruction": ' + b"[" * 2000 + b"]" * 2000 + b', "output": "a"}',
    "two rows": lambda kind, row: json.dumps(row).encode() * 2,
    "mark in the middle": lambda kind, row: b"\xef\xbb\xbf" + json.dumps(row).encode(),
}
CASES = [(kind, spoiler) for spoiler in SPOILERS for kind in MAKERS]  # 200, and 100 more by drawing
CASES += random.Random(7).choices(CASES, k=100)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(load_tokenizer(smollm2_folder()))


def corpus_of(path: Path, template: ChatTemplate, rejected: RejectedRecords | None = None) -> Corpus:
    (given,) = parse_inputs([str(path)])
    reject = rejected.add if rejected else None
    return Corpus(validated_source(given), template, RecordReader(), 512, "drop", reject=reject)


def test_each_of_300_bad_records_ends_the_run_with_its_file_and_line(tmp_path: Path, template: ChatTemplate) -> None:
    draw = random.Random(1)
    for number, (kind, spoiler) in enumerate(CASES):
        lines = [json.dumps(MAKERS[kind](index)).encode() for index in range(6)]
        bad = draw.randrange(spoiler == "no object", 6)  # a list at the beginning is a JSON array
        lines.insert(bad, SPOILERS[spoiler](kind, MAKERS[kind](99)))
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(draw.choice([b"\n", b"\r\n"]).join(lines) + draw.choice([b"", b"\n"]))
        if spoiler == "mark in the middle" and bad == 0:  # at the beginning it is what editors write
            assert len(list(corpus_of(path, template))) == 7
            continue
        with pytest.raises(UserError) as error:
            list(corpus_of(path, template))
        message = str(error.value)
        assert message.startswith(f"{path}, line {bad + 1}: "), (kind, spoiler, message)
        assert message.count(str(path)) == 1 and "\n" not in message
        assert ": " in message.removeprefix(f"{path}, line {bad + 1}: "), "what to do about it"
    assert number == 299


@pytest.mark.parametrize("packed", [False, True])
def test_all_of_them_are_set_aside_and_all_good_ones_kept(tmp_path: Path, template: ChatTemplate, packed: bool) -> None:
    draw = random.Random(2)
    lines, bad = [], {}
    for kind, spoiler in CASES:
        lines += [json.dumps(MAKERS[kind](index)).encode() for index in range(draw.randrange(4))]
        bad[len(lines) + 1] = SPOILERS[spoiler](kind, MAKERS[kind](99))
        lines.append(bad[len(lines) + 1])
    path = tmp_path / ("all.jsonl.gz" if packed else "all.jsonl")
    content = b"\n" + b"\n".join(lines)
    path.write_bytes(gzip.compress(content) if packed else content)
    with RejectedRecords(tmp_path / "all.rejected.jsonl") as rejected:
        corpus = corpus_of(path, template, rejected)
        kept = list(corpus)
        rejected.keep()
    found = [json.loads(line) for line in (tmp_path / "all.rejected.jsonl").read_text().splitlines()]
    assert {row["line"] for row in found} == {line + 1 for line in bad}
    assert all(row["file"] == str(path) and row["reason"] and row["row"] for row in found)
    assert len(kept) == len(lines) - len(bad) == corpus.counts.num_kept
    assert corpus.counts.num_read == len(lines) == corpus.counts.num_kept + sum(corpus.counts.dropped.values())
    assert corpus.counts.dropped == {"bad row": len(bad)}


def here(monkeypatch: pytest.MonkeyPatch, data: Path, *options: str) -> int:
    arguments = ["--tokenizer", str(smollm2_folder()), "--input", str(data), "--seq-length", "256", *options]
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    try:
        run(lambda: tokenize.main(arguments))
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_skipping_says_so_and_the_next_good_run_clears_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    good = json.dumps(MAKERS["instruction"](1))
    data.write_text(f"{good}\n{{\n{good}\n")
    assert here(monkeypatch, data) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]
    assert f"error: {data}, line 2: not valid JSON" in capsys.readouterr().err
    assert here(monkeypatch, data, "--bad-rows", "skip") == 0
    assert f"bad records: 1, with the reasons in {tmp_path}/data.rejected.jsonl" in capsys.readouterr().out
    (source,) = TokenizedRows(tmp_path / "Tokenized-data-SmolLM2-135M-Instruct-256_text_document").manifest["sources"]
    assert (source["read"], source["kept"], source["dropped"]) == (3, 2, {"bad row": 1})
    data.write_text(f"{good}\n{good}\n")
    assert here(monkeypatch, data, "--bad-rows", "skip") == 0
    assert not (tmp_path / "data.rejected.jsonl").exists()


def test_nothing_but_bad_records_is_refused_and_leaves_the_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{\n{"a": 1}\n')
    assert here(monkeypatch, data, "--bad-rows", "skip") == 2
    assert "no conversation of" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "data.rejected.jsonl"]


def test_a_file_that_is_cut_short_ends_the_run_even_where_bad_records_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What comes after cannot be read, so it cannot be accounted for."""
    good = json.dumps([MAKERS["instruction"](index) for index in range(50)]).encode()
    for name, content, message in (
        ("data.json", good[:-20], "the file ends inside this record"),
        ("data.json.gz", gzip.compress(good)[:-20], "it is cut short"),
        ("data.json", good.replace(b"}, {", b"} {", 1), "expected `,` or `]` after a record"),
    ):
        data = tmp_path / name
        data.write_bytes(content)
        assert here(monkeypatch, data, "--bad-rows", "skip") == 2
        assert message in capsys.readouterr().err
        data.unlink()
        assert not list(tmp_path.iterdir())


def test_bad_records_of_tables_have_their_line_or_number(tmp_path: Path, template: ChatTemplate) -> None:
    table = tmp_path / "data.csv"
    table.write_bytes(b'instruction,output\nq,a\n"q\n2",a\nq,\nq,a,more\nq,\xff\n')
    with RejectedRecords(tmp_path / "r.jsonl") as rejected:
        assert len(list(corpus_of(table, template, rejected))) == 2
        rejected.keep()
    found = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"].split(":")[0]) for row in found] == [
        (5, "field 'output' is empty"),
        (6, "the record has 3 values, the header 2"),
        (7, "field 'output' is not UTF-8"),
    ]
    parquet = tmp_path / "data.parquet"
    rows = [MAKERS["messages"](1), {"messages": [{"role": "user", "content": "q"}]}, MAKERS["messages"](2)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    with pytest.raises(UserError) as error:
        list(corpus_of(parquet, template))
    assert str(error.value).startswith(f"{parquet}, record 2: the last turn is 'user'")


def test_a_record_of_10_megabytes_is_a_record_like_others(tmp_path: Path, template: ChatTemplate) -> None:
    path = tmp_path / "data.jsonl"
    rows = [MAKERS["instruction"](1), {"instruction": "long", "output": "many words " * 1_000_000}]
    path.write_text("\n".join(map(json.dumps, rows)))
    corpus = corpus_of(path, template)
    assert len(list(corpus)) == 1
    assert corpus.counts.dropped == {"longer than 512 tokens": 1}
