"""One reader for every door: the same record from every form of file, compressed or not, and through a download."""

import csv
import gzip
import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron.sft.chat.conversations import RecordReader
from megatron.sft.data.hub_records import Selection, open_records, write_records
from megatron.sft.data.report import RejectedRecords
from megatron.sft.data.sources import count_records, file_format, read_records
from megatron.sft.runtime.errors import UserError

LARGE = (1 << 63, -(1 << 63) - 1, 123456789012345678901234567890, int("7" * 400))


def record(number: int) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": number, "b": 1e22, "c": 0.1}}}
    return {
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
        "messages": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "", "tool_calls": [call]}],
    }


def as_csv(value: dict[str, Any]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([list(value), [json.dumps(item) for item in value.values()]])
    return text.getvalue()


FORMS = {
    "lines.jsonl": lambda value: json.dumps(value) + "\n",
    "array.json": lambda value: json.dumps([value]),
    "pretty.json": lambda value: json.dumps(value, indent=2),
    "wrapped.json": lambda value: json.dumps({"type": "conversation", "instances": [value]}),
    "data.json": lambda value: json.dumps({"version": 1, "data": [value]}, indent=1),
    "table.csv": as_csv,
}
PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", LARGE)
def test_whole_numbers_of_any_size_stay_what_they_are(form: str, packed: str, number: int, tmp_path: Path) -> None:
    path = tmp_path / (form + packed)
    path.write_bytes(PACKED[packed](FORMS[form](record(number)).encode()))
    (read,) = read_records(path)
    (_, answer) = RecordReader().example(read.fields).messages
    arguments = answer["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"a": number, "b": 1e22, "c": 0.1} and type(arguments["a"]) is int
    assert count_records(path) == 1
    target = tmp_path / "assets" / "copy.json"
    assert write_records(open_records(path, Selection(), "main", tmp_path), {}, target)[0] == 1
    assert str(number) in target.read_text().replace("\\", "")
    (copied,) = read_records(target)
    assert copied.fields == read.fields


def test_a_rejected_record_keeps_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    pyarrow.parquet.write_table(pyarrow.table({"a": [Decimal(LARGE[2])]}), tmp_path / "a.parquet")
    (read,) = read_records(tmp_path / "a.parquet")
    assert read.fields == {"a": LARGE[2]}
    with RejectedRecords(path) as rejected:
        rejected.add(read, "why")
        rejected.keep()
    assert json.loads(path.read_text())["row"] == {"a": LARGE[2]}


@pytest.mark.parametrize("form", ["parquet", "folder", "arrow map"])
def test_nulls_that_arrow_adds_are_not_in_the_record(form: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"call": {"a": 2}, "list": [{"x": 1}, {"y": None}]}, {"call": {"city": "Oslo"}, "list": []}]
    table = pyarrow.Table.from_pylist(rows)
    if form == "arrow map":
        kind = pyarrow.map_(pyarrow.string(), pyarrow.int64())
        table = pyarrow.table({"call": pyarrow.array([[("a", 2)], [("b", 3)]], kind)})
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "train.parquet"
    pyarrow.parquet.write_table(table, path)
    target = tmp_path / "out" / "copy.json"
    source = path.parent if form == "folder" else path
    write_records(open_records(source, Selection(), "main", tmp_path), {}, target)
    calls = [json.loads(line)["call"] for line in target.read_text().splitlines()]
    assert calls == ([{"a": 2}, {"b": 3}] if form == "arrow map" else [{"a": 2}, {"city": "Oslo"}])
    assert calls == [read.fields["call"] for read in read_records(path)]


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("text", "form", "places", "records"),
    [
        ('{\n"a": [\n1\n]}', "json object", [1], [{"a": [1]}]),
        ('\n{\n"a": 1\n}\n{"a": 2}\n{\n"a": 3}', "json object", [2, 5, 6], [{"a": 1}, {"a": 2}, {"a": 3}]),
        ('{"data": [{"a": 1},\n{"a": 2}]}', "json object of data", [1, 2], [{"a": 1}, {"a": 2}]),
        ('{"type": "text_only", "instances": [ {"text": "t"} ]}', "json object of instances", [1], [{"text": "t"}]),
        ('{"rows": [{"a": {"data": [1]}}], "features": [{"b": 1}]}', "json object of rows", [1], [{"a": {"data": [1]}}]),
        (f"{json.dumps(MESSAGES)}\n\n{json.dumps(TURNS)}", "json lines", [1, 3], [{"messages": MESSAGES}, {"messages": TURNS}]),
        (json.dumps([MESSAGES, TURNS]), "json array", [1, 1], [{"messages": MESSAGES}, {"messages": TURNS}]),
        (json.dumps({"data": MESSAGES}), "json lines", [1], [{"data": MESSAGES}]),
        ('{"data": [{"a": 1}]}\n{"data": [{"a": 2}]}', "json lines", [1, 2], [{"data": [{"a": 1}]}, {"data": [{"a": 2}]}]),
    ],
)
def test_the_form_of_a_file_is_found(
    text: str, form: str, places: list[int], records: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    read = list(read_records(path))
    assert (file_format(path), [one.number for one in read], [one.fields for one in read]) == (form, places, records)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(MESSAGES), "line 1: the list holds messages"),
        ('{"system": "S", "instances": [{"a": 1}]}', "'system' next to the records in 'instances'"),
        ('{"train": [{"a": 1}], "test": [{"a": 2}]}', "'test' next to the records in 'train'"),
        ('{"data": [{"a": 1}]}\nx', "line 2: not valid JSON"),
        ('{"data": [{"a": 1},\n]}', "line 2: `,` before the end"),
        ('{"data": [{"a": 1},\n{"a"', "line 2: the file ends inside this record"),
        ('{\n"a": 1,\n"b": }\n', "line 3: not valid JSON"),
        ('{"a": 1}{"a": 2}\n{"a": 3}', "line 1: not valid JSON"),
        ('{"a": 1e400}', "line 1: not valid JSON"),
    ],
)
def test_what_is_not_read_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        [one.fields for one in read_records(path)]
