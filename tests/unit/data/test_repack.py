"""Packing again: other lengths, seeds and packings from the files alone, every conversation as it was."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron.sft import repack
from megatron.sft.data.tokenized import TokenizedRows, data_file
from megatron.sft.runtime.errors import run
from tests.support.tokenized_material import NAME, write

Content = tuple[bytes, bytes]  # tokens and mask of a conversation


def here(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The entry module in this process; its exit status."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    try:
        run(lambda: repack.main([*map(str, arguments)]))
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def contents(prefix: Path) -> Counter[Content]:
    """The conversations of a set of files, read with its reader."""
    found: Counter[Content] = Counter()
    for row in TokenizedRows(prefix):
        borders = np.cumsum(row.conversation_lengths)[:-1]
        for tokens, trained in zip(np.split(row.tokens, borders), np.split(row.trained, borders), strict=True):
            found[tokens.tobytes(), trained.tobytes()] += 1
    return found


def test_every_conversation_comes_back_with_its_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path)
    assert here(monkeypatch, source, "--seq-length", 512) == 0
    longer = tmp_path / NAME.format(512)
    assert contents(longer) == contents(source)
    old, new = TokenizedRows(source), TokenizedRows(longer)
    assert (new.manifest["length"], new.manifest["seed"], new.manifest["chat_template"]) == (512, 1234, "T")
    assert new.manifest["conversations"] == 300 and new.manifest["tokens"] == old.manifest["tokens"]
    assert len(new) == -(-old.manifest["tokens"] // 512)
    assert max(len(row.tokens) for row in new) <= 512
    (step,) = new.manifest["repacked"]
    assert (step["from"], step["from_length"], step["dropped"], step["truncated"]) == (source.name, 128, {}, 0)
    assert here(monkeypatch, f"{longer}.bin", "--seq-length", 1024, "--seed", 5) == 0
    assert [step["length"] for step in TokenizedRows(tmp_path / NAME.format(1024)).manifest["repacked"]] == [512, 1024]
    assert contents(tmp_path / NAME.format(1024)) == contents(source)


def test_another_seed_replaces_the_files_and_no_packing_gives_each_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path)
    before, rows = contents(source), [row.tokens.tolist() for row in TokenizedRows(source)]
    assert here(monkeypatch, source, "--seed", 9) == 0
    assert contents(source) == before
    assert [row.tokens.tolist() for row in TokenizedRows(source)] != rows
    assert here(monkeypatch, source, "--no-packing", "--output-prefix", tmp_path / "alone") == 0
    alone = TokenizedRows(tmp_path / "alone")
    assert len(alone) == 300 and contents(tmp_path / "alone") == before
    assert (alone.manifest["algorithm"], alone.manifest["options"]["packing"]) == ("none", False)
    assert len(list(tmp_path.iterdir())) == 6


def test_the_same_again_does_nothing_and_the_same_seed_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path)
    for name in ("one", "two"):
        assert here(monkeypatch, source, "--seq-length", 256, "--output-prefix", tmp_path / name) == 0
    for ending in ("bin", "idx"):
        assert data_file(tmp_path / "one", ending).read_bytes() == data_file(tmp_path / "two", ending).read_bytes()
    capsys.readouterr()
    assert here(monkeypatch, source, "--seq-length", 256, "--output-prefix", tmp_path / "one") == 0
    assert capsys.readouterr().out.startswith("already packed")


def test_longer_conversations_are_dropped_cut_or_refused_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path)
    too_long = sum(count for (tokens, _), count in contents(source).items() if len(tokens) // 8 > 40)
    assert 10 < too_long < 290
    shorter = tmp_path / NAME.format(40)
    assert here(monkeypatch, source, "--seq-length", 40) == 0
    manifest = TokenizedRows(shorter).manifest
    assert manifest["conversations"] == 300 - too_long
    assert manifest["repacked"][0]["dropped"] == {"longer than 40 tokens": too_long}
    assert f"dropped {too_long} conversations: longer than 40 tokens" in capsys.readouterr().out

    assert here(monkeypatch, source, "--seq-length", 40, "--overlong", "truncate") == 0
    (step,) = TokenizedRows(shorter).manifest["repacked"]
    assert step["truncated"] + sum(step["dropped"].values()) == too_long and step["truncated"] > 0
    whole = contents(source)
    for tokens, mask in contents(shorter):
        assert any(t.startswith(tokens) and m.startswith(mask) for t, m in whole)
        assert any(mask)

    for prefix in (shorter, source):  # the target stays as it was
        content = contents(prefix)
        assert here(monkeypatch, source, "--seq-length", 40, "--overlong", "error", "--seed", 3) == 2
        assert contents(prefix) == content
    assert "tokens, more than 40: " in capsys.readouterr().err
    assert here(monkeypatch, source, "--seq-length", 3) == 2
    assert "no conversation of" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("length", [128, 60, 200])
def test_groups_stay_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    source = write(tmp_path, grouped=True)
    assert here(monkeypatch, source, "--seq-length", length, "--overlong", "truncate", "--seed", 2) == 0
    rows = TokenizedRows(tmp_path / NAME.format(length))
    assert rows.manifest["groups"] == 150
    assert rows.groups is not None
    unit_of_row = np.cumsum(~rows.continues_group)
    units = np.repeat(unit_of_row, [len(row.conversation_lengths) for row in rows])
    lengths = np.concatenate([row.conversation_lengths for row in rows])
    numbers = np.repeat(np.arange(len(rows)), [len(row.conversation_lengths) for row in rows])
    for group in range(150):
        members = rows.groups == group
        assert len(set(units[members])) == 1
        assert (len(set(numbers[members])) == 1) == (lengths[members].sum() <= length)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["nowhere"], "manifest of tokenised data nowhere.json is missing"),
        (["--seq-length", "0", "x"], "argument --seq-length: '0' is not a whole number, at least 1"),
        (["--seed", "x", "x"], "argument --seed: 'x' is not a whole number, at least 0"),
    ],
)
def test_bad_arguments_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert here(monkeypatch, *arguments) == 2
    assert reason in capsys.readouterr().err
