"""A run's inputs are checked before its first step: damage of every kind is named, and nothing is hashed twice."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.sft.checkpoint.folder import open_checkpoint
from megatron.sft.data.tokenized import TokenizedRows, data_file, read_index, write_index
from megatron.sft.planning import input_checks
from megatron.sft.planning.options import TrainOptions
from megatron.sft.planning.resolution import plan_run
from megatron.sft.runtime import checksum_cache
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import sealed, sha256_of_file
from tests.support.copied_material import copy_of_data

Edit = Callable[[dict[str, np.ndarray]], object]


@pytest.fixture
def data(packed_rows: Path, tmp_path: Path) -> Path:
    """A copy of the packed rows to damage, old enough to be remembered."""
    return copy_of_data(packed_rows, tmp_path / "data")


def plan_of(converted: Path, data: Path, save: Path) -> Any:
    options = TrainOptions(load=converted, data_path=data, save=save, train_iters=1, global_batch_size=8)
    return plan_run("train", options, num_processes=1)


def rewritten(prefix: Path, edit: Edit) -> Path:
    """The .idx written anew with other contents, and a manifest that agrees with it: damage that no checksum shows."""
    index = read_index(data_file(prefix, "idx"))
    parts = {name: np.array(getattr(index, name)) for name in ("lengths", "documents", "modes")}
    edit(parts)
    write_index(data_file(prefix, "idx"), index.dtype, *parts.values())
    correct_checksums(prefix)
    return prefix


def correct_checksums(prefix: Path) -> None:
    path = data_file(prefix, "json")
    manifest = json.loads(path.read_text())
    for ending, facts in manifest["files"].items():
        file = data_file(prefix, ending)
        facts |= {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
    path.write_text(json.dumps(sealed(manifest)))


STRUCTURE: dict[str, tuple[Edit, str]] = {
    "a segment of no tokens": (
        lambda p: p["lengths"].put([0, 1], [0, p["lengths"][0] + p["lengths"][1]]),
        "has a segment without tokens",
    ),
    "a negative length": (lambda p: p["lengths"].put([0], [-5]), "has tokens|has a segment without tokens"),
    "rows that go back": (lambda p: p["documents"].put([1, 2], p["documents"][[2, 1]]), "do not follow one another"),
    "rows that begin later": (lambda p: p["documents"].put([0], [1]), "do not follow one another"),
    "rows that end early": (lambda p: p["documents"].put([-1], [p["documents"][-1] - 1]), "do not follow one another"),
    "a row that begins within a conversation": (
        lambda p: p["documents"].put([1], [p["documents"][1] - 1]),
        "does not begin with a conversation",
    ),
    "a trained first token": (lambda p: p["modes"].put([0], [3]), "marks the first token of a conversation as trained"),
    "an unknown mode": (lambda p: p["modes"].put([0], [10]), "has a segment of an unknown kind"),
    "a join within a row": (lambda p: p["modes"].put([2], [6]), "has a segment of an unknown kind"),
    "a border less": (lambda p: p["modes"].put([2], [0]), "has conversations 543, its manifest 544"),
    "a mask less": (lambda p: p["modes"].put([1], [0]), "has trained_tokens"),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_an_index_that_contradicts_itself_is_refused_though_its_checksum_agrees(data: Path, name: str) -> None:
    edit, message = STRUCTURE[name]
    rewritten(data, edit)
    with pytest.raises(UserError, match=message) as error:
        TokenizedRows(data)
    assert "packed.v1.idx" in str(error.value) and "scripts/3_tokenize.sh" in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": None},
        {"files": {"bin": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"../../evil": {"bytes": 1, "sha256": "0" * 64}}},
        {"length": "128"},
        {"max_token_id": None},
        {"max_token_id": -1},
        {"conversations": 1.5},
        {"rows": 63},
        {"tokens": 7},
        {"dtype": "int32"},
    ],
)
def test_a_manifest_that_lacks_or_contradicts_something_is_refused(data: Path, changes: dict[str, Any]) -> None:
    path = data_file(data, "json")
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | changes)))
    with pytest.raises(UserError, match=r"packed\.v1\.(json|idx) "):
        TokenizedRows(data)


def test_checksums_are_computed_once_and_again_after_a_change(
    converted: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksum_cache, "MTIME_GRANULARITY_NS", 0)
    read: list[str] = []
    check_sums = checksum_cache.check_sums
    monkeypatch.setattr(
        checksum_cache,
        "check_sums",
        lambda files, *rest: (read.extend(path.suffix for path in files), check_sums(files, *rest)),
    )
    plan = plan_of(converted, data, tmp_path / "out")
    input_checks.check_rows(plan.rows, plan.options.save)
    assert sorted(read) == [".bin", ".idx"]
    input_checks.check_rows(plan.rows, plan.options.save)
    assert sorted(read) == [".bin", ".idx"]
    os.utime(data_file(data, "idx"))
    input_checks.check_rows(plan.rows, plan.options.save)
    assert sorted(read) == [".bin", ".idx", ".idx"]
    content = bytearray(data_file(data, "bin").read_bytes())
    content[1000] ^= 1
    data_file(data, "bin").write_bytes(content)
    with pytest.raises(UserError, match=r"packed\.v1\.bin is damaged \(its checksum differs"):
        input_checks.check_rows(plan.rows, plan.options.save)


def test_a_file_that_changed_just_now_is_not_remembered(converted: Path, data: Path, tmp_path: Path) -> None:
    input_checks.check(plan_of(converted, data, tmp_path / "out"))
    memory = data.parent / ".packed.v1.checked.json"
    assert not memory.exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"files": 3}', '{"files": {"x": 1}}', "[" * 100_000, "\x00"])
def test_a_damaged_memory_means_hashing_again(converted: Path, data: Path, tmp_path: Path, content: str) -> None:
    (data.parent / ".packed.v1.checked.json").write_text(content)
    data_file(data, "bin").write_bytes(data_file(data, "bin").read_bytes()[::-1])
    with pytest.raises(UserError, match="is damaged"):
        input_checks.check(plan_of(converted, data, tmp_path / "out"))


def test_a_forged_memory_skips_the_checksum_and_nothing_else(converted: Path, data: Path, tmp_path: Path) -> None:
    """Who can write it can write the data; sizes and structure are still looked at."""
    rewritten(data, STRUCTURE["a trained first token"][0])
    facts = TokenizedRows.__new__(TokenizedRows)
    facts.prefix, facts.manifest = data, json.loads(data_file(data, "json").read_text())
    memory = {checksum_cache.cache_key(path): checksum_cache.file_stamp(path, entry) for path, entry in facts.files.items()}
    (data.parent / ".packed.v1.checked.json").write_text(json.dumps({"files": memory}))
    with pytest.raises(UserError, match="marks the first token"):
        plan_of(converted, data, tmp_path / "out")


def test_where_the_data_folder_cannot_be_written_the_memory_is_in_the_output_folder(
    converted: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksum_cache, "MTIME_GRANULARITY_NS", 0)
    write_json = checksum_cache.write_json

    def read_only(path: Path, content: Any) -> None:  # as root, whom no permission stops
        if path.parent == data.parent:
            raise PermissionError(13, "Read-only file system")
        write_json(path, content)

    monkeypatch.setattr(checksum_cache, "write_json", read_only)
    (tmp_path / "out").mkdir()
    input_checks.check(plan_of(converted, data, tmp_path / "out"))
    assert (tmp_path / "out" / ".data.checked.json").exists()


def test_a_start_checkpoint_that_is_not_what_was_converted_is_refused(converted: Path, tmp_path: Path) -> None:
    from megatron.sft.families.registry import read_architecture

    folder = tmp_path / "converted"
    shutil.copytree(converted, folder)
    checkpoint = open_checkpoint(folder)
    architecture = read_architecture(checkpoint.manifest["source"]["config"], "config")
    input_checks.check_checkpoint(checkpoint, architecture)
    path = checkpoint.path / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"__0_0\.distcp is damaged"):
        input_checks.check_checkpoint(checkpoint, architecture)
    manifest = checkpoint.path / "manifest.json"
    content = {**checkpoint.manifest, "shape": {"num_layers": 9}}
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        open_checkpoint(folder)
    manifest.write_text(json.dumps(sealed(content)))
    with pytest.raises(UserError, match="has num_layers 9 for the weights and 3 in its configuration"):
        input_checks.check_checkpoint(open_checkpoint(folder), architecture)
