"""The formats of docs/data.md: each record of its tables is read, and trains what the table says."""

import json
import re
from functools import cache
from typing import Any

import pytest

from megatron.sft.chat.conversations import Example, RecordReader, renamed_columns
from megatron.sft.chat.encoding import load_tokenizer
from megatron.sft.chat.template import ChatTemplate
from megatron.sft.chat.template_settings import chosen_template
from megatron.sft.runtime.errors import UserError
from tests.support import tiny
from tests.support.material import smollm2_folder

Record = dict[str, Any]
END = "<|im_end|>"


@cache
def template(name: str = "qwen") -> ChatTemplate:
    return ChatTemplate(load_tokenizer(smollm2_folder()), chosen_template(name))


def trained(example: Example, name: str = "qwen") -> list[str]:
    """The trained texts, with their end tokens."""
    if example.text:
        rendered = template(name).render_text(example.text)
    else:
        rendered = template(name).render(example.messages, example.tools, example.loss_flags)
    return [rendered.text[start:end] for start, end in rendered.trained]


def table_rows(title: str, last: str = "trained") -> list[list[str]]:
    """The cells of the table of docs/data.md that ends with these columns."""
    rows = [line for line in (tiny.ROOT / "docs/data.md").read_text().splitlines() if line.startswith("|")]
    start = next(index for index, line in enumerate(rows) if f"| {title} | {last} |" in line)
    found = []
    for line in rows[start + 2 :]:
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) < 3 or "`{" not in line:
            break
        found.append(cells)
    return found


def words(texts: list[str]) -> str:
    return " ".join(" ".join(texts).replace(END, "").replace("<|endoftext|>", "").split())


@pytest.mark.parametrize("name, record, expected", table_rows("a record"), ids=lambda text: text[:30])
def test_a_record_of_the_table_trains_what_it_says(name: str, record: str, expected: str) -> None:
    reader = RecordReader()
    texts = trained(reader.example(json.loads(record.strip("`"))))
    assert words(texts) == expected
    assert all(text.endswith((END, "<|im_end|>", "<|endoftext|>")) for text in texts)


@pytest.mark.parametrize("name, record, columns, expected", table_rows("MAP_COLUMNS"), ids=lambda text: text[:30])
def test_what_is_refused_is_read_with_the_advice_of_the_table(name: str, record: str, columns: str, expected: str) -> None:
    fields = json.loads(record.strip("`"))
    with pytest.raises(UserError):
        RecordReader().example(fields)
    reader = RecordReader(renamed_columns(columns.strip("`").split()))
    assert words(trained(reader.example(fields))) == expected


@pytest.mark.parametrize("name, record, columns, expected", table_rows("MAP_COLUMNS"), ids=lambda text: text[:30])
def test_the_advice_of_the_messages_leads_to_a_record_that_is_read(name: str, record: str, columns: Any, expected: str) -> None:
    """Each message's MAP_COLUMNS is followed until there is no message."""
    if name == "medical-o1":
        pytest.skip("the table's own advice, which no message can know")
    chosen: dict[str, str] = {}
    while columns := advised_columns(json.loads(record.strip("`")), chosen):
        assert not columns.keys() & chosen.keys()
        chosen |= columns
    assert words(trained(RecordReader(chosen).example(json.loads(record.strip("`"))))) == expected


def advised_columns(record: Record, chosen: dict[str, str]) -> dict[str, str]:
    """The MAP_COLUMNS of the message for a record; none if it is read."""
    try:
        RecordReader(chosen).example(record)
    except UserError as error:
        return renamed_columns(re.findall(r'MAP_COLUMNS="([^"]*)"', str(error))[0].split())
    return {}


def objects_of(value: Any) -> list[Record]:
    """All objects within a JSON value, outside of what describes a function and of metadata."""
    if isinstance(value, list):
        return [found for item in value for found in objects_of(item)]
    if not isinstance(value, dict):
        return []
    inner = [item for name, item in value.items() if name not in ("tools", "functions", "gen_input_configs")]
    return [value, *objects_of(inner)]


@pytest.mark.parametrize("name, record, expected", table_rows("a record"), ids=lambda text: text[:30])
def test_a_field_anywhere_in_a_record_is_not_lost(name: str, record: str, expected: str) -> None:
    for index in range(len(objects_of(json.loads(record.strip("`"))))):
        for value in ("Words that are lost.", 0.5, False, ["x"], {"a": "b"}):
            fields = json.loads(record.strip("`"))
            objects_of(fields)[index]["extra"] = value
            with pytest.raises(UserError, match="extra"):
                RecordReader().example(fields)
