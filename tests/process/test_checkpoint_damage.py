"""A damaged checkpoint is found before anything is loaded, and the newest one that is whole is taken instead."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron.sft.checkpoint import verification
from megatron.sft.checkpoint.folder import MANIFEST, TRACKER
from tests.support import tiny

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def run(train: Callable[..., Path]) -> Path:
    """Checkpoints after 4, 8 and 10 steps."""
    return train(1, "--save-interval", "4")


def _flip(name: str, share: float = 0.5) -> Damage:
    def damage(root: Path) -> None:
        path = next((root / "iter_0000010").glob(name))
        content = bytearray(path.read_bytes())
        content[int(share * len(content))] ^= 4
        path.write_bytes(content)

    return damage


def _on(name: str, change: Callable[[Path], object]) -> Damage:
    return lambda root: change(next((root / "iter_0000010").glob(name))) and None


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _swap(root: Path) -> None:
    for name in ("__0_0.distcp", ".metadata"):
        shutil.copy(root / "iter_0000008" / name, root / "iter_0000010" / name)


def _stale_folder(root: Path) -> None:
    shutil.rmtree(root / "iter_0000010")
    shutil.copytree(root / "iter_0000008", root / "iter_0000010")


def _edit_manifest(path: Path) -> None:
    manifest = json.loads(path.read_text())
    manifest["training"]["consumed_rows"] += 8
    path.write_text(json.dumps(manifest))


def _unfinished(root: Path) -> None:
    (root / "iter_0000010").rename(root / ".iter_0000010.unfinished")


# What is done to the newest of three checkpoints, and what must be said of it.
DAMAGES: dict[str, tuple[Damage, str]] = {
    "a bit of the weights": (_flip("__0_0.distcp"), "__0_0.distcp is damaged (its checksum differs"),
    "a bit of the index": (_flip(".metadata", 0.9), ".metadata is damaged (its checksum differs"),
    "a bit of the manifest": (_flip(MANIFEST, 0.6), "manifest.json"),
    "a cut file": (_on("__0_0.distcp", _cut), "__0_0.distcp has"),
    "a missing file": (_on("common.pt", Path.unlink), "common.pt is missing"),
    "no manifest": (_on(MANIFEST, Path.unlink), "manifest.json is missing"),
    "another file": (_on("common.pt", lambda p: p.with_name("__1_0.distcp").touch()), "__1_0.distcp is not in the manifest"),
    "files of another checkpoint": (_swap, "is damaged (its checksum differs"),
    "another checkpoint under its name": (_stale_folder, "belongs to iteration 8, not to 10"),
    "another position": (_on(MANIFEST, _edit_manifest), "manifest.json is damaged"),
    "a save that was broken off": (_unfinished, f"{TRACKER} says '10'"),
}


def _damaged_copy(run: Path, folder: Path, damage: Damage) -> Path:
    copy = folder / "copy"
    shutil.copytree(run, copy)
    damage(copy)
    return copy


@pytest.mark.parametrize("what", DAMAGES)
def test_of_damaged_checkpoints_the_newest_whole_one_is_taken(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    damage, reason = DAMAGES[what]
    copy = _damaged_copy(run, tmp_path, damage)
    with _one_process():
        taken = verification.checked_run(verification.newest_checkpoint(copy))
    assert taken.iteration == 8
    said = capsys.readouterr().out
    assert reason in said and "taking iteration 8" in said
    assert (copy / TRACKER).read_text() == "8"


TRACKERS = {"an older one": "4", "one that is not there": "12", "no number": "1\x000", "nothing": ""}


@pytest.mark.parametrize("what", [*TRACKERS, "missing"])
def test_a_damaged_tracker_alone_loses_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    tracker = Path(TRACKER)
    damage = (lambda root: (root / tracker).unlink()) if what == "missing" else (lambda root: write(root / tracker))

    def write(path: Path) -> None:
        path.write_text(TRACKERS[what])

    copy = _damaged_copy(run, tmp_path, damage)
    assert verification.newest_checkpoint(copy).iteration == 10
    assert f"{tracker}" in capsys.readouterr().out


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(
    run: Path, converted: Path, packed_rows: Path, tmp_path: Path
) -> None:
    """Also without a word: it must not begin again from zero, as if there were nothing."""

    def damage(root: Path) -> None:
        for path in root.glob("iter_*/__0_0.distcp"):
            _cut(path)

    copy = _damaged_copy(run, tmp_path, damage)
    same = ["--load", converted, "--data-path", packed_rows, "--save", copy, "--train-iters", "10"]
    for mode in ("", "resume"):
        output = tiny.run_module("train", mode, *same, "--global-batch-size", "8", status=2)
        assert "__0_0.distcp has" in output and "no other checkpoint in" in output
    assert "already has checkpoints" in tiny.run_module("train", "train", *same, status=2)
    assert tiny.losses(copy) == tiny.losses(run)


def test_a_run_continues_from_the_newest_whole_checkpoint_as_if_nothing_had_happened(
    run: Path, train: Callable[..., Path], tmp_path: Path
) -> None:
    copy = _damaged_copy(run, tmp_path, _flip("__0_0.distcp"))
    train(1, "--save-interval", "4", mode="", save=copy)
    assert tiny.losses(copy) == tiny.losses(run)
    # The damaged one was replaced.
    assert verification.newest_checkpoint(copy).iteration == 10
    with _one_process():
        assert verification.checked_run(verification.newest_checkpoint(copy)).iteration == 10


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    from megatron.sft.runtime import device

    before = dict(os.environ)
    try:
        with device.process_group():
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)
