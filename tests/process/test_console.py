"""Runs whose terminal, pipe, log or disk goes away, and two commands on one output: nothing is lost, nothing is silent."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.real_runs import Material, RealRun, make_material

SECONDS = 240
LINE = "done: 4 steps"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("console"))


def settings(material: Material, save: Path, train_iters: int = 4) -> dict[str, str]:
    given = {"PRETRAIN_CHECKPOINT_PATH": material.checkpoint, "DATA_PATH": material.data, "OUTPUT_PATH": save}
    given |= {"LENGTH": 64, "PRECISION": "fp32", "TRAIN_ITERS": train_iters, "GLOBAL_BATCH_SIZE": 4}
    given |= {"SAVE_INTERVAL": 1000, "LR": "1e-3", "GPUS_PER_NODE": 1, "MEGATRON_SFT_DEVICE": "cpu", "OMP_NUM_THREADS": 1}
    given |= {"PYTHON": sys.executable}
    return os.environ | {name: str(value) for name, value in given.items()}


def train(material: Material, save: Path, shell: str = "{train}", **options: int) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which {train} is step 4."""
    command = shell.format(train=f"bash {tiny.ROOT}/scripts/4_train.sh train")
    environment = settings(material, save, **options)
    return subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=SECONDS, cwd=tiny.ROOT
    )


@pytest.mark.parametrize(
    "shell, reason",
    [
        ("{train} >/dev/full 2>&1", "No space left on device"),
        ("{train} 2>&1 | head -n 1; exit ${{PIPESTATUS[0]}}", "Broken pipe"),
        ("{train} >&- 2>&-", "standard output is gone"),
    ],
)
def test_a_console_that_is_gone_ends_nothing(material: Material, tmp_path: Path, shell: str, reason: str) -> None:
    ended = train(material, tmp_path / "run", shell)
    console = (tmp_path / "run" / "console.log").read_text()
    assert ended.returncode == 0, console
    assert reason in console and LINE in console
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "4"


def test_ctrl_c_at_a_terminal_with_tee_saves_and_says_so(material: Material, tmp_path: Path) -> None:
    save, log = tmp_path / "run", tmp_path / "log"
    line = f"trap : INT; bash {tiny.ROOT}/scripts/4_train.sh train 2>&1 | tee {log}; echo ${{PIPESTATUS[0]}} >{tmp_path}/status"
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tiny.ROOT)
        os.execve("/bin/bash", ["bash", "-c", line], settings(material, save, train_iters=1_000_000))
    shown = b""
    until = time.monotonic() + SECONDS
    with contextlib.suppress(OSError):  # Linux ends a terminal without processes so
        while time.monotonic() < until and b"iteration 3/" not in b" ".join(shown.split()):
            shown += os.read(terminal, 65536)
        os.write(terminal, b"\x03")
        while time.monotonic() < until and os.read(terminal, 65536):
            pass
    os.waitpid(process, 0)
    assert (tmp_path / "status").read_text() == "75\n", shown.decode()
    saved = int((save / "latest_checkpointed_iteration.txt").read_text())
    said = log.read_text() + (save / "console.log").read_text()
    assert saved >= 3 and f"after iteration {saved}, which is saved" in said


def test_one_run_an_output_path(material: Material, tmp_path: Path) -> None:
    first = RealRun(material, tmp_path / "run", "1x1", ["--train-iters", "100000", "--save-interval", "50000"]).start()
    until = time.monotonic() + SECONDS
    while not (first.save / "metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.2)
    second = train(material, first.save)
    assert second.returncode == 2 and f"{first.save} is being written by process" in second.stderr, second.stderr
    assert first.process is not None and first.process.poll() is None
    os.killpg(first.process.pid, signal.SIGKILL)  # its processes end with it
    first.process.wait()
    assert (first.save / ".lock").exists()
    after = train(material, first.save)
    assert after.returncode == 0 and LINE in after.stdout, after.stderr
    assert not (first.save / ".lock").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_run_whose_first_checkpoint_does_not_fit_is_not_started(material: Material, small_disk: Path) -> None:
    ended = train(material, small_disk / "run")
    assert ended.returncode == 2 and "a checkpoint of this run needs 1." in ended.stderr and "MB" in ended.stderr
    assert "iteration" not in ended.stdout
