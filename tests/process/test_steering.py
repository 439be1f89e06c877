"""Watching and steering a run: the best checkpoint, an early end, a ceiling of the loss, files that ask for something."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.fork_server import SERVER
from tests.support.hub_server import Hub
from tests.support.real_runs import Material, make_material

SECONDS = 240
# A learning rate at which the tiny model overfits its 43 training rows after some steps.
OVERFITS = {"LR": "3e-3", "MIN_LR": "3e-3", "LR_WARMUP_ITERS": 0, "SPLIT": "90,10,0", "EVAL_INTERVAL": 2, "SAVE_INTERVALS": 2}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("steering"))


def settings(material: Material, save: Path, **given: object) -> dict[str, str]:
    basic = {"PRETRAIN_CHECKPOINT_PATH": material.checkpoint, "DATA_PATH": material.data, "OUTPUT_PATH": save}
    basic |= {"PRECISION": "fp32", "TRAIN_ITERS": 20, "GLOBAL_BATCH_SIZE": 4, "GPUS_PER_NODE": 1, "LR": "1e-3"}
    return os.environ | SERVER.python() | {name: str(value) for name, value in (basic | given).items()}


def script(name: str, *arguments: object, environment: dict[str, str], status: int = 0) -> str:
    line = ["bash", str(tiny.ROOT / "scripts" / name), *map(str, arguments)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=SECONDS, cwd=tiny.ROOT)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def iterations(save: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in save.glob("iter_*"))


def of_validations(save: Path) -> dict[int, float]:
    return {int(line["iteration"]): line["validation_loss"] for line in tiny.metrics(save) if "validation_loss" in line}


def test_the_best_checkpoint_is_kept_named_and_exported_and_a_run_that_gets_no_better_ends(
    material: Material, tmp_path: Path
) -> None:
    save = tmp_path / "run"
    watched = {**OVERFITS, "TRAIN_ITERS": 60, "KEEP_LAST": 1, "EARLY_STOP_PATIENCE": 3, "VALIDATE_AT_START": 1}
    environment = settings(material, save, **watched)
    said = script("4_train.sh", "train", environment=environment)
    losses = of_validations(save)
    assert min(losses) == 0, "the first validation is of the untrained model"
    best = min((iteration for iteration in losses if iteration), key=lambda iteration: losses[iteration])
    last = max(losses)
    assert last == min(losses, key=lambda iteration: losses[iteration]) + 6, "three validations after the lowest"
    assert last < 60 and f"done: {last} steps (EARLY_STOP_PATIENCE" in said
    assert json.loads((save / "best_checkpoint.json").read_text()) == {"iteration": best, "validation_loss": losses[best]}
    assert iterations(save) == [best, last], "KEEP_LAST=1 keeps the newest, and spares the best"
    # The line that the run prints exports the best one.
    next_line = said.rpartition("next: ")[2].strip()
    assert next_line.endswith(" best")
    subprocess.run(next_line, shell=True, env=environment, check=True, cwd=tiny.ROOT, timeout=SECONDS)
    script("5_export.sh", save, material.folder / "tiny_qwen2", tmp_path / "by number", best, environment=environment)
    tiny.assert_same_weights(save / "export", tmp_path / "by number")
    # Nothing is left to do, unless the patience is raised; then the run continues as if it had never ended.
    assert "nothing to do" in script("4_train.sh", environment=environment) and max(of_validations(save)) == last
    environment |= {"EARLY_STOP_PATIENCE": "4", "TRAIN_ITERS": "60"}
    script("4_train.sh", "resume", environment=environment)
    patient = tmp_path / "patient"
    script("4_train.sh", "train", environment=environment | {"OUTPUT_PATH": str(patient), "VALIDATE_AT_START": "0"})
    assert tiny.losses(save) == tiny.losses(patient) and iterations(save) == iterations(patient)
    # What is needed and missing is named.
    environment |= {"OUTPUT_PATH": str(tmp_path / "other"), "SPLIT": "100,0,0"}
    assert "EARLY_STOP_PATIENCE needs validation rows" in script("4_train.sh", "plan", environment=environment, status=2)
    arguments = (material.checkpoint, tmp_path, tmp_path / "x", "best")
    assert "names no best checkpoint" in script("5_export.sh", *arguments, environment=environment, status=2)


def test_a_validation_that_was_interrupted_is_counted_once(material: Material, tmp_path: Path) -> None:
    """The checkpoint was saved before the validation that makes it the best."""
    save = tmp_path / "run"
    environment = settings(material, save, SPLIT="90,10,0", EVAL_INTERVAL=4, SAVE_INTERVALS=4, TRAIN_ITERS=4)
    script("4_train.sh", "train", environment=environment)
    manifest = save / "iter_0000004" / "manifest.json"
    from megatron.sft.checkpoint.folder import sealed

    content = json.loads(manifest.read_text())
    del content["training"]["watch"], content["sha256"]
    manifest.write_text(json.dumps(sealed(content)))
    (save / "best_checkpoint.json").unlink()
    script("4_train.sh", "resume", environment=environment)
    best = json.loads((save / "best_checkpoint.json").read_text())
    assert best == {"iteration": 4, "validation_loss": of_validations(save)[4]}


def test_files_in_the_folder_ask_a_run_to_save_and_to_stop(material: Material, tmp_path: Path) -> None:
    save = tmp_path / "run"
    save.mkdir()
    (save / "stop-now").touch()
    os.utime(save / "stop-now", (1, 1))  # of an earlier run
    environment = settings(material, save, TRAIN_ITERS=1_000_000, SAVE_INTERVALS=1_000_000, LOG_INTERVAL=50)
    line = ["bash", str(tiny.ROOT / "scripts" / "4_train.sh"), "train"]
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(line, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=tiny.ROOT)
        wait_for(save / "metrics.jsonl", process)
        (save / "save-now").touch()
        wait_for(save / "latest_checkpointed_iteration.txt", process)
        first = int((save / "latest_checkpointed_iteration.txt").read_text())
        (save / "stop-now").touch()
        assert process.wait(SECONDS) == 75
    said = (tmp_path / "log").read_text()
    last = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert iterations(save) == [first, last] and first < last
    assert f"stopped by stop-now after iteration {last}" in said and "stop-now is from before this start" in said
    assert not (save / "save-now").exists() and not (save / "stop-now").exists()
    assert (save / "stopped-by-request").exists(), "so that a SLURM job is not requeued"
    environment |= {"TRAIN_ITERS": str(last)}
    assert "nothing to do" in script("4_train.sh", environment=environment)
    assert not (save / "stopped-by-request").exists()


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + SECONDS
    while not path.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    assert path.exists(), f"{path} did not appear"


def test_a_diverged_run_ends_and_what_it_had_is_kept(material: Material, tmp_path: Path) -> None:
    save = tmp_path / "run"
    ceiling = {"LOSS_CEILING": "0.5", "LOSS_CEILING_PATIENCE": 5, "SAVE_INTERVALS": 2}
    said = script("4_train.sh", "train", environment=settings(material, save, **ceiling), status=2)
    assert "above LOSS_CEILING=0.5 for 5 steps" in said and "at iteration 5" in said
    assert iterations(save) == [2, 4] and len(tiny.losses(save)) == 5
    # A resumed run counts on.
    script("4_train.sh", "resume", environment=settings(material, save, **ceiling), status=2)
    assert len(tiny.losses(save)) == 5


def test_exports_are_written_while_the_run_continues(material: Material, tmp_path: Path) -> None:
    for name, options in {"whole": {}, "adapters": {"LORA_RANK": 2}}.items():
        save = tmp_path / name
        environment = settings(material, save, TRAIN_ITERS=6, SAVE_INTERVALS=100, EXPORT_EVERY=2, KEEP_LAST=1, **options)
        said = script("4_train.sh", "train", environment=environment)
        written = sorted(path.name for path in (save / "exports").iterdir())
        assert written == ["iter_0000002", "iter_0000004", "iter_0000006"] and said.count("exported iteration") == 3
        script("5_export.sh", save, material.folder / "tiny_qwen2", tmp_path / f"{name}.now", environment=environment)
        weights = "adapter_model.safetensors" if options else "model.safetensors"
        now = (tmp_path / f"{name}.now" / weights).read_bytes()
        assert (save / "exports" / "iter_0000006" / weights).read_bytes() == now
        assert (save / "exports" / "iter_0000002" / weights).read_bytes() != now
    # A model that is gone is named before the run starts.
    moved = tmp_path / "checkpoint"
    shutil.copytree(material.checkpoint, moved)
    (material.folder / "tiny_qwen2").rename(tmp_path / "moved")
    environment = settings(material, tmp_path / "third", EXPORT_EVERY=2)
    assert "EXPORT_EVERY needs the model" in script("4_train.sh", "train", environment=environment, status=2)
    (tmp_path / "moved").rename(material.folder / "tiny_qwen2")


def test_an_export_is_pushed_where_it_is_asked_for(material: Material, tmp_path: Path) -> None:
    export = material.checkpoint, material.folder / "tiny_qwen2"
    with Hub({}, writer="may-write") as hub:
        environment = settings(material, tmp_path, HF_ENDPOINT=hub.address, HF_HUB_DISABLE_XET=1, HF_HOME=tmp_path / "home")
        environment |= {"PUSH_TO": "owner/tuned", "MEGATRON_SFT_PYTHON": sys.executable}
        without = script("5_export.sh", *export, tmp_path / "none", environment=environment, status=2)
        assert "PUSH_TO=owner/tuned needs a token" in without and not (tmp_path / "none").exists()
        refused = script("5_export.sh", *export, tmp_path / "none", environment=environment | {"HF_TOKEN": "x"}, status=2)
        assert "refused" in refused and not (tmp_path / "none").exists()
        environment |= {"HF_TOKEN": "may-write"}
        said = script("5_export.sh", *export, tmp_path / "out", environment=environment)
        assert f"pushed {tmp_path / 'out'} to {hub.address}/owner/tuned" in said
        repository = hub.repositories["models/owner/tuned"]
        assert repository.token == "may-write", "a new repository is private"
        files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert repository.files == files and "model.safetensors" in files
        # Pushed again into the same repository; without PUSH_TO nothing is asked of the hub.
        script("5_export.sh", *export, tmp_path / "again", environment=environment)
        before = sum(hub.requests.values())
        del environment["PUSH_TO"]
        script("5_export.sh", *export, tmp_path / "quiet", environment=environment)
        assert sum(hub.requests.values()) == before
