"""Records and conversations: what is read from a file, and how every bad record is refused."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron.sft.chat.conversations import Messages, RecordReader
from megatron.sft.data import json_records
from megatron.sft.data.hub_records import Selection, open_records, write_records
from megatron.sft.data.sources import count_records, data_files, file_format, read_records
from megatron.sft.runtime.errors import UserError


def random_value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.random()
    if kind < 0.5:
        return "".join(draw.choice('ab"\\{}[],\n\té🙂 ') for _ in range(draw.randrange(30)))
    if kind < 0.6 or depth > 2:
        return draw.choice([1, -2.5, True, None])
    values = [random_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return values if kind < 0.8 else dict(zip("wxyz", values, strict=False))


@pytest.mark.parametrize("piece_bytes", [4, 7, 64, 1 << 20])
def test_lines_and_arrays_of_any_shape_are_read_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(json_records, "PIECE_SIZE", piece_bytes)
    draw = random.Random(piece_bytes)
    path = tmp_path / "data.json"
    for _ in range(40):
        rows = [{name: random_value(draw) for name in "abc"} for _ in range(draw.randrange(1, 6))]
        for text in (
            json.dumps(rows),
            json.dumps(rows, indent=2, ensure_ascii=False),
            "\n".join(map(json.dumps, rows)),
            "\r\n\n".join(map(json.dumps, rows)) + "\n",
        ):
            path.write_bytes(draw.choice([b"", b"\xef\xbb\xbf"]) + text.encode())
            assert [record.fields for record in read_records(path)] == rows


def test_a_bad_element_of_an_array_is_refused_by_itself_and_those_after_it_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    bad = [
        b'{"a": 1, "a": 2}',
        b'{"a": NaN}',
        b'{"a": "\\ud83d"}',
        b'{"a": "\xff"}',
        b'{"a": Infinity}',
        b'["a"]',
        b"7",
        b"null",
    ]
    good = [{"a": 18446744073709551615}, {"a": 0.1, "b": [-0.0, 1e5]}, {"a": "😀 ]},{"}]
    content = b",\n".join(bad + [json.dumps(record).encode() for record in good])
    path.write_bytes(b"\xef\xbb\xbf[\n" + content + b"]")
    records = list(read_records(path))
    assert [record.number for record in records] == list(range(2, 13))
    for record in records[: len(bad)]:
        with pytest.raises(UserError, match=f"data.json, line {record.number}: "):
            assert record.fields
    assert [record.fields for record in records[len(bad) :]] == good


def test_an_array_is_recognised_by_content_and_records_know_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('\n [\n {"a": 1},\n\n {"a":\n 2}, {"a": 3}]\n')
    assert file_format(path) == "json array"
    assert [(record.number, record.fields["a"]) for record in read_records(path)] == [(3, 1), (5, 2), (6, 3)]
    path.write_text('{"a": 1}\n\n{"a": 2}')
    assert file_format(path) == "json lines"
    assert [(record.number, record.end) for record in read_records(path)] == [(1, 9), (3, 18)]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"a": 1}\n{"a":', "line 2: not valid JSON"),
        (b'{"a": 1}\n[1]\n', "line 2: the record is a list"),
        (b'{"a": "\xff"}', "line 1: byte 8 of the record is not UTF-8"),
        (b'{"a": "\\ud83d"}', "line 1: not valid JSON (a text has half of a surrogate pair"),
        (b'{"a": NaN}', "line 1: not valid JSON (it has NaN"),
        (b'{"a": [-Infinity]}', "line 1: not valid JSON (it has -Infinity"),
        (b'[{"a": 1}\n,]', "line 2: `,` before the end"),
        (b'[{"a": 1}\n{"b": 2}]', "line 2: expected `,` or `]`"),
        (b'[{"a": 1}', "not closed with `]`"),
        (b'[{"a": 1},', "not closed with `]`"),
        (b'[\n{"a": "x', "line 2: the file ends inside this record"),
        (b'[\n{"a": [1}, {"a": 2}]', "line 2: not valid JSON"),
        (b'[\n{"a": "x\n"}]', "line 2: not valid JSON"),
        (b"[\n1, 2]", "line 2: the record is a number"),
        (b"[{}]\n x", "line 2: 'x' after the end"),
        (b" \n ", "is empty"),
        (b"\x1f\x8b\x08", "cut short"),
        (b"PAR1", "not a readable parquet file"),
        (b"PK\x03\x04", "a zip archive: unpack it"),
        (b"\xff\xfe{\x00", "UTF-16"),
    ],
)
def test_a_file_that_is_not_data_is_refused_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        [record.fields for record in read_records(path)]
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("d.csv", b"\xef\xbb\xbfinstruction;output\nHi;Hello\n", "save the table with commas"),
        ("d.tsv", b"instruction,output\nHi,Hello\n", "'instruction,output'"),
        ("d.xlsx", b"PK\x03\x04", "save it as CSV"),
        ("saved/data-00000-of-00001.arrow", b"ARROW1", "load_from_disk"),
        ("saved/notes.txt", b"x", "give the file itself"),
    ],
)
def test_what_is_nearly_a_table_or_a_folder_of_data_is_refused_with_a_way_to_read_it(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_records(path.parent if "/" in name else path))
    assert message in str(error.value)


def test_memory_is_bounded_by_records_and_not_by_the_file(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "data.json"
    row = json.dumps({"instruction": "q" * 1000, "output": "a" * 1000})
    path.write_text("[" + ",\n".join([row] * 10_000) + "]")
    tracemalloc.start()
    assert sum(1 for _ in read_records(path)) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20  # of 20 MB


ROWS = [{"a": f"é {index}", "b": [{"c": index}, {"c": 1, "d": "x"}]} for index in range(300)]


def test_every_kind_of_file_gives_the_same_records(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row) for row in ROWS).encode()
    array = json.dumps(ROWS, indent=1).encode()
    half = lines.index(b"\n", len(lines) // 2) + 1
    frames = zstandard.compress(lines[:half]) + zstandard.compress(lines[half:])
    contents = {"a.jsonl": lines, "b.json": array, "c.jsonl.gz": gzip.compress(lines), "d.json.zst": zstandard.compress(array)}
    contents |= {"e.gz": gzip.compress(lines[:half]) + gzip.compress(lines[half:]), "f.zst": frames}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "g.parquet", row_group_size=70)
    for file in sorted(tmp_path.iterdir()):
        assert [record.fields for record in read_records(file)] == ROWS, file.name
        assert count_records(file) == 300
        assert 0 < list(read_records(file))[-1].end <= max(file.stat().st_size, len(array))


def test_in_a_typed_table_null_is_a_value_of_a_column_and_nothing_within_a_cell(tmp_path: Path) -> None:
    rows = [{"a": "NA", "b": [{"c": 1}]}, {"a": None, "b": [{"d": {"e": None, "f": "x"}}, None]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [record.fields for record in read_records(tmp_path / "a.parquet")] == [
        {"a": "NA", "b": [{"c": 1}]},
        {"a": None, "b": [{"d": {"f": "x"}}, None]},
    ]


def test_a_file_gives_the_same_records_directly_and_through_a_download(tmp_path: Path) -> None:
    rows = [{"a": "NA", "b": [{"c": "1"}], "e": None}, {"a": None, "b": [{"d": "2"}], "e": "x"}]
    data = tmp_path / "data"
    for name in ("parquet", "json", "csv", "csv.gz"):
        (data / name).mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data / "parquet" / "train.parquet")
    (data / "json" / "train.json").write_text(json.dumps(rows))
    (data / "csv" / "train.csv").write_text('a,b\nNA,"x, y"\n"",null\n')
    (data / "csv.gz" / "train.csv.gz").write_bytes(gzip.compress((data / "csv" / "train.csv").read_bytes()))
    for file in sorted(data.rglob("train.*")):
        expected = [record.fields for record in read_records(file)]
        assert expected[0]["a"] == "NA"
        for source in (file, file.parent):  # alone, and as `datasets` finds it in a folder
            target = tmp_path / "out" / file.parent.name / "data.json"
            write_records(open_records(source, Selection(), "main", tmp_path / "cache"), {}, target)
            assert [record.fields for record in read_records(target)] == expected, source


def test_a_table_has_text_in_every_cell(tmp_path: Path) -> None:
    path = tmp_path / "data.tsv"
    path.write_text('\ufeffa\tb\n"x\ny"\t\n\n"say ""hi"""\t2\n', encoding="utf-8")
    assert [(record.number, record.fields) for record in read_records(path)] == [
        (2, {"a": "x\ny", "b": ""}),
        (5, {"a": 'say "hi"', "b": "2"}),
    ]


def test_a_folder_is_its_data_files_in_order(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.json", "a.csv", ".hidden.jsonl", ".git/x.json", "README.md", "dataset_infos.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"a": "1"}' if "csv" not in name else "a\n1\n")
    (tmp_path / "Tokenized-x-model-64_text_document.json").write_text("{}")
    (tmp_path / "b" / "x.rejected.jsonl").write_text("{}")
    assert [str(file.relative_to(tmp_path)) for file in data_files(tmp_path)] == ["a.csv", "b/1.json", "b/2.jsonl"]
    assert [record.place for record in read_records(tmp_path)] == [f"{tmp_path}/a.csv, line 2"] + [
        f"{tmp_path}/b/{name}, line 1" for name in ("1.json", "2.jsonl")
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no data file"):
        data_files(tmp_path / "empty")


@pytest.mark.parametrize("name", ["data.jsonl.gz", "data.jsonl.zst"])
def test_a_packed_file_that_is_cut_short_or_damaged_is_refused(tmp_path: Path, name: str) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    packed = gzip.compress(lines) if name.endswith("gz") else zstandard.compress(lines)
    path = tmp_path / name
    for content in (packed[:-5], packed[: len(packed) // 2], packed[:100] + b"\0" * 50 + packed[150:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cut short|damaged"):
            list(read_records(path))


def test_memory_of_packed_and_columnar_files_is_bounded_too(tmp_path: Path) -> None:
    import tracemalloc

    draw = random.Random(1)
    rows = [{"instruction": "q" * 1000, "output": draw.randbytes(500).hex()} for _ in range(10_000)]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    for file in sorted(tmp_path.iterdir()):
        tracemalloc.start()
        assert sum(1 for _ in read_records(file)) == 10_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20, file.name


def test_a_repeated_field_is_refused_and_what_looks_like_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    fine = [{"a": 'he said ": \\": x'}, {"a": ":", "b": {"a": ": "}}, {"a": [{"b": 1}, {"b": 2}]}, {'k":': '"'}]
    path.write_text("\n".join(map(json.dumps, fine)) + '\n{"a" : 1, "b":[{ "c":1,"d" :2}]}')
    assert [record.fields for record in read_records(path)][:4] == fine
    for text in ('{"a": 1, "a": 2}', '{"b": {"a": 1, "a": 1}}', '{"b": [{"a" : "x\\":", "a" : 1}]}'):
        path.write_text(text)
        with pytest.raises(UserError, match="line 1: field 'a' is repeated"):
            [record.fields for record in read_records(path)]


ASKED = {"role": "user", "content": "Q"}
ANSWERED = {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"instruction": "Q", "output": "A"}, [ASKED, ANSWERED]),
        ({"instruction": "Q", "input": "", "output": "A", "system": None}, [ASKED, ANSWERED]),
        (
            {"instruction": "Q", "input": "more", "output": "A", "system": "S"},
            [{"role": "system", "content": "S"}, {"role": "user", "content": "Q\nmore"}, ANSWERED],
        ),
        ({"messages": [ASKED, ANSWERED]}, [ASKED, ANSWERED]),
        (
            {"messages": [{"role": "system", "content": ""}, ASKED, ANSWERED]},
            [{"role": "system", "content": ""}, ASKED, ANSWERED],
        ),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, [ASKED, ANSWERED]),
        ({"id": 7, "conversations": [ASKED, ANSWERED], "system": "S"}, [{"role": "system", "content": "S"}, ASKED, ANSWERED]),
    ],
)
def test_every_format_becomes_messages(row: dict[str, Any], expected: Messages) -> None:
    assert RecordReader().conversation(row) == expected


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "Q", "answer": "A"}, "fields are 'question', 'answer'; expected 'instruction' and 'output'"),
        ({"instruction": "Q"}, "field 'output' is missing"),
        ({"instruction": "Q", "output": None}, "field 'output' is null: it must be text"),
        ({"instruction": "Q", "output": " \n"}, "field 'output' is empty"),
        ({"instruction": ["Q"], "output": "A"}, "field 'instruction' is a list: it must be text"),
        ({"instruction": "Q", "output": "A", "input": 3}, "field 'input' is a number"),
        ({"instruction": "Q", "output": "A", "history": [["a"]]}, "history[0] is not a pair"),
        ({"messages": [ASKED, ANSWERED], "history": [["a", "b"]]}, "field 'history' is not supported"),
        ({"instruction": "Q", "output": "A", "messages": []}, "several formats (messages and instruction)"),
        ({"messages": []}, "'messages' is an empty list"),
        ({"messages": "hello"}, "'messages' is text: it must be a list"),
        ({"messages": str([ASKED, ANSWERED])}, "field 'messages' is a list in Python's spelling"),
        ({"messages": [ASKED, "A"]}, "messages[1]' is text"),
        ({"messages": [ASKED, {"role": "assistant"}]}, "field 'messages[1].content' is missing"),
        ({"messages": [ASKED, {"role": "critic", "content": "A"}]}, "messages[1].role is 'critic', an unknown role"),
        ({"conversations": [{"from": "user?", "value": "Q"}]}, "conversations[0].from is 'user?', an unknown role"),
        ({"messages": [ASKED, ANSWERED | {"tool_calls": [{}]}]}, "field 'messages[1].tool_calls[0].name' is missing"),
        ({"messages": [ASKED, ANSWERED | {"weight": 2}]}, "field 'messages[1].weight' is 2: it must be 0 or 1"),
        ({"messages": [ASKED, ASKED]}, "the last turn is 'user' and none is an assistant turn"),
        ({"messages": [ANSWERED]}, "turn 0 ('assistant') is the first"),
        ({"messages": [ANSWERED, ASKED]}, "turn 0 ('assistant') is the first"),
    ],
)
def test_a_bad_row_is_refused_with_its_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        RecordReader().conversation(row)
    assert message in str(error.value)


def test_columns_are_renamed_and_unused_ones_counted() -> None:
    reader = RecordReader({"problem": "instruction", "solution": "output"})
    rows = [{"problem": "Q", "solution": "A", "id": 1}, {"problem": "Q", "solution": "A", "id": 2, "url": ""}]
    assert [reader.conversation(row) for row in rows] == [[ASKED, ANSWERED]] * 2
    assert reader.ignored_fields == {"id": 2, "url": 1}
    with pytest.raises(UserError, match="field 'problem' is missing"):
        reader.conversation({"solution": "A"})
    with pytest.raises(UserError, match="both 'problem' and 'instruction'"):
        reader.conversation({"problem": "Q", "instruction": "Q", "solution": "A"})
