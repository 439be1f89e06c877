"""Who may write an output, for holders that live, died, or run on another machine."""

import json
import os
import threading
from pathlib import Path

import pytest

from megatron.sft.runtime import output_lock
from megatron.sft.runtime.errors import UserError


def left_by(lock: Path, **changes: object) -> dict[str, object]:
    record = {"host": "elsewhere", "pid": 7, "space": "another", "started": "yesterday", "beat": 1, **changes}
    lock.write_bytes(json.dumps(record).encode().ljust(512))
    return record


def test_a_second_holder_is_refused_and_the_file_goes(tmp_path: Path) -> None:
    output = tmp_path / "run"
    said = rf"is being written by process {os.getpid()} on .*, started"
    with output_lock.held(output), pytest.raises(UserError, match=said):
        output_lock.held(output).__enter__()
    assert not list(tmp_path.iterdir())
    with output_lock.held(output):
        pass


def test_what_a_dead_process_left_is_taken(tmp_path: Path) -> None:
    output = tmp_path / "run"
    lock = tmp_path / ".run.lock"
    for content in (b"", b"\0" * 512, b"{half", b"[]"):
        lock.write_bytes(content)
        with output_lock.held(output):
            pass


@pytest.mark.parametrize("lives", [True, False])
def test_a_holder_on_another_machine_lives_if_its_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    monkeypatch.setattr(output_lock, "SILENT_SECONDS", 2.0)
    output, lock = tmp_path / "run", tmp_path / ".run.lock"
    left_by(lock)
    timer = threading.Timer(1.0, left_by, (lock,), {"beat": 2})
    if not lives:
        with output_lock.held(output):
            return
    timer.start()
    with pytest.raises(UserError, match="process 7 on elsewhere, started yesterday"):
        output_lock.held(output).__enter__()
    timer.join()
