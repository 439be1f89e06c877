"""The test inputs themselves: made once, whole or not at all, also by two processes at the same time."""

import multiprocessing
import time
from pathlib import Path

import pytest

from tests.support import material


def build_slowly(folder: Path) -> None:
    (folder / "first").write_text("1")
    time.sleep(0.5)
    with open(folder.parent / "builds", "a") as log:
        log.write("built\n")


def build_in(cache: Path) -> None:
    material.CACHE = cache
    material._built_once("thing", build_slowly)


def test_two_processes_at_once_build_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=build_in, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert (tmp_path / "builds").read_text() == "built\n"
    assert [path.name for path in (tmp_path / "thing").iterdir()] == ["first"]


def test_what_fails_leaves_nothing_and_says_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(material, "CACHE", tmp_path)

    def build(folder: Path) -> None:
        (folder / "half").write_text("1")
        material._fetch(["python3", "-c", "raise SystemExit('no such package')"], folder)

    with pytest.raises(material.MaterialError, match="no such package"):
        material._built_once("thing", build)
    assert [path.name for path in tmp_path.iterdir()] == [".thing.lock"]


def test_the_model_folder_is_a_plain_one_in_bf16() -> None:
    from safetensors import safe_open

    folder = material.smollm2_folder()
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
        assert "lm_head.weight" not in tensors.keys()  # noqa: SIM118
