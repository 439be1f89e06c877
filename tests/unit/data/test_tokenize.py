"""Step 3 as users run it: the command, its result, its messages, and what it leaves when something is wrong."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron.sft import tokenize
from megatron.sft.data.store import ConversationStore
from megatron.sft.data.tokenized import TokenizedRows
from megatron.sft.runtime.errors import run
from tests.support.material import smollm2_folder

GOOD = {"instruction": "What colour is the sky?", "output": "Blue."}
PREFIX = "Tokenized-data-SmolLM2-135M-Instruct-{}_text_document"


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(data: Path, length: object = 512, *options: str) -> list[str]:
    return ["--tokenizer", str(smollm2_folder()), "--input", str(data), "--seq-length", str(length), *options]


def here(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> int:
    """The entry module in this process; its exit status."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    try:
        run(lambda: tokenize.main(arguments))
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_same_run_again_does_nothing_and_any_change_tokenises_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [GOOD, GOOD])
    manifest = tmp_path / f"{PREFIX.format(64)}.json"
    assert here(monkeypatch, command(data, 64)) == 0
    before = manifest.stat().st_mtime_ns
    capsys.readouterr()
    assert here(monkeypatch, command(data, 64)) == 0
    assert "already tokenised" in capsys.readouterr().out
    assert manifest.stat().st_mtime_ns == before
    assert here(monkeypatch, command(data, 64, "--seed", "7")) == 0
    assert json.loads(manifest.read_text())["seed"] == 7
    write_lines(data, [GOOD, GOOD, GOOD])
    assert here(monkeypatch, command(data, 64, "--seed", "7")) == 0
    assert json.loads(manifest.read_text())["conversations"] == 3
    manifest.with_suffix(".bin").write_bytes(b"")
    assert here(monkeypatch, command(data, 64, "--seed", "7")) == 0
    assert len(TokenizedRows(manifest.with_suffix(""))) == 3


LONG = {"messages": [*({"role": role, "content": "word " * 30} for role in ("user", "assistant") * 3)]}
LONG_QUESTION = {"instruction": "word " * 200, "output": "short"}


def test_long_conversations_are_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [GOOD, LONG, LONG_QUESTION])
    assert here(monkeypatch, command(data, 100)) == 0
    assert "dropped 2 conversations: longer than 100 tokens" in capsys.readouterr().out
    (source,) = TokenizedRows(tmp_path / PREFIX.format(100)).manifest["sources"]
    assert source["dropped"] == {"longer than 100 tokens": 2}


def test_truncation_keeps_the_first_tokens_and_invents_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [LONG, LONG_QUESTION])
    assert here(monkeypatch, command(data, 100, "--overlong", "truncate")) == 0
    output = capsys.readouterr().out
    assert "cut 1 conversations at 100 tokens" in output
    assert "dropped 1 conversations: no trained token among the first 100" in output
    rows = TokenizedRows(tmp_path / PREFIX.format(100))
    (row,) = list(rows)
    assert len(row.tokens) == 100
    assert 0 < row.trained.sum() < 100
    assert row.tokens[-1] != 2
    assert rows.manifest["sources"][0]["truncated"] == 1


BAD_ROWS = [
    ('{"instruction": "Q", "output": "A"', "not valid JSON"),
    ('{"instruction": "Q"}', "field 'output' is missing"),
    ('{"instruction": "Q", "output": ""}', "field 'output' is empty"),
    ('{"messages": [{"role": "user", "content": "Q"}]}', "the last turn is 'user'"),
    ('{"messages": [{"role": "robot", "content": "Q"}]}', "an unknown role"),
]


@pytest.mark.parametrize("row, reason", BAD_ROWS)
def test_a_bad_row_stops_with_file_line_field_and_fix_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], row: str, reason: str
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(f"{json.dumps(GOOD)}\n{row}\n{json.dumps(GOOD)}\n")
    assert here(monkeypatch, command(data)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {data}, line 2: ")
    assert reason in line
    assert files_in(tmp_path) == ["data.jsonl"]


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"--seq-length": "4k"}, "LENGTH is '4k': give"),
        ({"--seq-length": "0"}, "LENGTH is '0'"),
        ({"--seq-length": "-5"}, "LENGTH is '-5'"),
        ({"--input": "nowhere.json"}, "nowhere.json does not exist"),
        ({"--input": "a.json b c.json"}, "a.json does not exist"),
        ({"--tokenizer": "nowhere"}, "tokenizer folder nowhere does not exist"),
        ({"--tokenizer": "README"}, "tokenizer folder README is not a folder"),
        ({"--tokenizer": "."}, "has no tokenizer.json or vocabulary file"),
        ({"--overlong": "cut"}, "invalid choice: 'cut'"),
        ({"--seed": "x"}, "SEED is 'x'"),
        ({"--num-workers": "0"}, "NUM_WORKERS is '0'"),
        ({"--map-column": "problem"}, "MAP_COLUMNS has 'problem': give OLD=NEW"),
        ({"--seq-length": "8"}, "no conversation of"),
        ({"--output-prefix": "README/result"}, "cannot write to README"),
    ],
)
def test_bad_arguments_get_one_line_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changed: dict[str, str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README").write_text("not a folder")
    write_lines(tmp_path / "data.jsonl", [GOOD])
    options = dict(zip(*[iter(command(Path("data.jsonl")))] * 2, strict=True)) | changed
    # `--seq-length=-5`, as a negative number looks like an option
    assert here(monkeypatch, [f"{name}={value}" for name, value in options.items()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert reason in line
    assert files_in(tmp_path) == ["README", "data.jsonl"]


def test_a_damaged_tokenizer_gets_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [GOOD])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    assert here(monkeypatch, ["--tokenizer", str(tmp_path / "model"), "--input", str(data), "--seq-length", "64"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model cannot be loaded" in line


def test_a_full_disk_gets_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    data = write_lines(tmp_path / "data.jsonl", [GOOD])
    monkeypatch.setattr(ConversationStore, "_write_rows", full)
    assert here(monkeypatch, command(data)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no space left in" in line
    assert files_in(tmp_path) == ["data.jsonl"]


def test_unknown_fields_stop_the_run_or_are_ignored_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [GOOD | {"id": 1}, GOOD | {"persona": "A sailor."}])
    assert here(monkeypatch, command(data)) == 2
    assert capsys.readouterr().err.startswith(f"error: {data}, line 2: field 'persona' ('A sailor.') is unknown")
    assert here(monkeypatch, command(data, 512, "--unknown-fields", "ignore")) == 0
    manifest = TokenizedRows(tmp_path / PREFIX.format(512)).manifest
    assert (manifest["unknown_fields"], manifest["sources"][0]["ignored_fields"]) == ("ignore", {"id": 1, "persona": 1})
    assert "field 'persona' of 1 records" in capsys.readouterr().out
    assert here(monkeypatch, command(data, 512, "--map-column", "persona=-")) == 0
    assert here(monkeypatch, command(data, 512, "--group-key", "persona")) == 0


def test_what_the_names_replaced_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [GOOD, GOOD | {"output": "I am {{name}}, {{ name }}."}] * 2)
    assert here(monkeypatch, command(data, 512, "--model-name", "Zed", "--model-author", "Acme")) == 0
    printed = capsys.readouterr().out
    assert "[[I am Zed, Zed.<|im_end|>]]" in printed
    assert "note: MODEL_NAME='Zed' stands for {{ name }} of 2 texts, {{name}} of 2 texts" in printed
    assert "note: MODEL_AUTHOR='Acme' is never used" in printed
    assert here(monkeypatch, command(data)) == 0
    printed = capsys.readouterr().out
    assert "[[I am {{name}}, {{ name }}.<|im_end|>]]" in printed
    assert "{{name}} of 2 texts stays as it is: set MODEL_NAME" in printed
