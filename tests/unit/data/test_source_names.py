"""Each conversation keeps the name of the source that it came from."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron.sft import repack, tokenize
from megatron.sft.data.mixture import source_names
from megatron.sft.data.tokenized import TokenizedRows, data_file
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import sealed, sha256_of_file, write_json
from tests.support import tiny
from tests.support.taught import untrained_folder

NAMES = ["sums", "words"]


def here(monkeypatch: pytest.MonkeyPatch, module: object, *arguments: object) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert module.main([*map(str, arguments)]) == 0  # type: ignore[attr-defined]


def sources_by_text(prefix: Path) -> dict[str, int]:
    """Each conversation's source by its text, read back from the files."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(untrained_folder())
    found = {}
    for row in TokenizedRows(prefix):
        assert row.sources is not None
        parts = np.split(row.tokens, np.cumsum(row.conversation_lengths)[:-1])
        for tokens, source in zip(parts, row.sources.tolist(), strict=True):
            found[tokenizer.decode(tokens)] = source
    return found


def test_each_conversation_keeps_its_source_through_packing_and_repacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        rows = [{"instruction": f"Ask {name} {n}", "output": f"Yes {n}"} for n in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = [argument for name in NAMES for argument in ("--input", tmp_path / f"{name}.jsonl")]
    prefix = tmp_path / "mixed"
    options = ("--seq-length", 256, "--num-workers", 1, "--output-prefix", prefix)
    here(monkeypatch, tokenize, "--tokenizer", untrained_folder(), *inputs, *options)
    manifest = TokenizedRows(prefix).manifest
    assert source_names(manifest) == NAMES
    assert manifest["files"]["sources"] == {"bytes": 160, "sha256": sha256_of_file(data_file(prefix, "sources"))}
    found = sources_by_text(prefix)
    assert len(found) == 80
    assert all(NAMES[source] in text for text, source in found.items())
    here(monkeypatch, repack, prefix, "--seq-length", 100, "--output-prefix", tmp_path / "again")
    assert sources_by_text(tmp_path / "again") == found


def test_one_source_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "Hi", "output": "Yes"}\n')
    options = ("--seq-length", 64, "--num-workers", 1, "--output-prefix", tmp_path / "a")
    here(monkeypatch, tokenize, "--tokenizer", untrained_folder(), "--input", tmp_path / "a.jsonl", *options)
    rows = TokenizedRows(tmp_path / "a")
    assert (rows.num_sources, rows.sources, rows[0].sources) == (0, None, None)
    assert not data_file(tmp_path / "a", "sources").exists()


def test_names_are_short_and_distinguished() -> None:
    paths = ["/a/x.jsonl", "/b/x.json.gz", "/c/folder", "org/set:part"]
    assert source_names({"sources": [{"path": path} for path in paths]}) == ["x (1)", "x (2)", "folder", "set:part"]


@pytest.fixture(scope="module")
def mixed_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[tiny.Conversation]], np.ndarray]:
    """8 packed rows whose conversations are of two sources in turn, at random; with the rows and the sources."""
    rows = tiny.random_rows(8, 128)
    prefix = tiny.write_rows(tmp_path_factory.mktemp("mixed") / "data", rows, length=128)
    sources = np.random.default_rng(3).integers(0, 2, sum(map(len, rows))).astype(np.int16)
    sources.tofile(data_file(prefix, "sources"))
    manifest = json.loads(data_file(prefix, "json").read_text())
    manifest["sources"] = [{"path": f"/data/{name}.jsonl"} for name in NAMES]
    path = data_file(prefix, "sources")
    manifest["files"]["sources"] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    write_json(data_file(prefix, "json"), sealed(manifest))
    return prefix, rows, sources


def test_damaged_sources_are_refused(mixed_rows: tuple[Path, object, np.ndarray], tmp_path: Path) -> None:
    for path in mixed_rows[0].parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    sources = mixed_rows[2].copy()
    sources[5] = 2
    sources.tofile(tmp_path / "data.sources")
    with pytest.raises(UserError, match=r"data\.sources does not fit"):
        TokenizedRows(tmp_path / "data")[0]
