"""The whole pipeline with paths and settings that a careless shell would run, split or expand.

The repository itself is in such a folder. Secrets in the environment appear in no file, message or command line.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support import tiny

ODD = 'it\'s "odd" $(touch RAN) `touch RAN` ; touch RAN & | < * ? [a-z] {a,b} ~ \\ # % ! é\n-rf'
# For data paths: a newline separates several paths, and # selects a part of the records.
ODD_DATA = 'it\'s "odd" $(touch RAN) `touch RAN` ; touch RAN & | * [a] {a,b} ~ \\ % ! é'
SECRETS = {"HF_TOKEN": "hf_SecretOfTheHub", "WANDB_API_KEY": "SecretOfTheTracker0123456789abcdef01234567"}
COPIED = ("megatron", "scripts", "tools", "assets/quickstart")


class Shell:
    """Runs the scripts of a copy of the repository in an odd folder, and watches all command lines meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / ODD
        self.root = self.work / "repository"
        for name in COPIED:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(tiny.ROOT / name, self.root / name, ignore=ignored)
        for path in tiny.ROOT.glob("requirements*.txt"):
            shutil.copy(path, self.root)
        self.environment = {**os.environ, **SECRETS, "MEGATRON_SFT_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
        self.environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "PYTHONDONTWRITEBYTECODE": "1"}
        self.environment.setdefault("MEGATRON_SFT_PYTHON", sys.executable)
        self.seen_secrets: set[str] = set()

    def run(self, script: str, *arguments: object, status: int = 0, **variables: object) -> str:
        environment = {**self.environment, **{name: str(value) for name, value in variables.items()}}
        process = subprocess.Popen(
            ["bash", self.root / script, *map(str, arguments)],
            cwd=self.work,
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        watcher = threading.Thread(target=self._watch, args=(process,))
        watcher.start()
        output, _ = process.communicate(timeout=tiny.TIMEOUT_SECONDS)
        watcher.join()
        assert process.returncode == status, f"{script}: {process.returncode}\n{output[-3000:]}"
        assert not any(secret in output for secret in SECRETS.values()), script
        return output

    def _watch(self, process: "subprocess.Popen[str]") -> None:
        while process.poll() is None:
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    line = path.read_bytes().decode(errors="replace")
                except OSError:
                    continue
                self.seen_secrets.update(name for name, secret in SECRETS.items() if secret in line)
            time.sleep(0.2)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(tmp_path_factory.mktemp("odd"))


def test_the_whole_pipeline_takes_any_path(shell: Shell) -> None:
    work, assets = shell.work, shell.work / "as sets $(touch RAN)"
    given = {"ASSETS_DIR": assets}
    made = work / "model $(touch RAN)\n*"
    subprocess.run(
        [shell.environment["MEGATRON_SFT_PYTHON"], "-m", "megatron.sft.quickstart", "model", made],
        cwd=tiny.ROOT, env=shell.environment, check=True, capture_output=True, timeout=tiny.TIMEOUT_SECONDS,
    )  # fmt: skip
    shell.run("scripts/1_download.sh", "model", made, **given)
    (model,) = (assets / "checkpoints").iterdir()
    rows = work / f"{ODD_DATA[:60]}.json"
    rows.write_bytes(b"".join((tiny.ROOT / "assets/quickstart/train.json").read_bytes().splitlines(keepends=True)[:60]))
    shell.run("scripts/1_download.sh", "dataset", rows, **given)
    data = next((assets / "data").rglob("*.json"))
    shell.run("tools/edit_tokenizer", model, "--keep-thinking")

    converted = work / "converted" / ODD
    shell.run("scripts/2_convert.sh", model, 1, 1, converted, VERIFY=0)
    prefix = Path(str(data.parent / "rows $(touch RAN) '*'"))
    shell.run("scripts/3_tokenize.sh", model, data, 256, OUTPUT_PREFIX=prefix, NUM_WORKERS=1)
    shell.run("tools/show_sample", prefix, "--html", work / f"page {ODD[:20]}.html")
    shell.run("tools/repack", prefix, "--seq-length", 128, "--output-prefix", f"{prefix} shorter")

    recipe = shell.root / "scripts" / "sft" / f"{ODD[:40]}.sh"
    shutil.copy(shell.root / "scripts/sft/SFT_Quickstart.sh", recipe)
    out = work / "out" / ODD
    settings = {"PRETRAIN_CHECKPOINT_PATH": converted, "DATA_PATH": prefix, "OUTPUT_PATH": out}
    settings |= {"TENSOR_PARALLEL_SIZE": 1, "GPUS_PER_NODE": 1, "TRAIN_ITERS": 2, "GLOBAL_BATCH_SIZE": 2}
    settings |= {"MICRO_BATCH_SIZE": 1, "SAVE_INTERVAL": 2, "SAVE_INTERVALS": 2, "LR_WARMUP_ITERS": 0, "PRECISION": "fp32"}
    recipe_name = str(recipe.relative_to(shell.root))
    shell.run(recipe_name, "plan", **settings)
    shell.run(recipe_name, "train", **settings)
    shell.run("scripts/4_train.sh", "resume", **{**settings, "TRAIN_ITERS": 3, "SPLIT": "98,2,0"})
    shell.run("tools/plot_loss", out, "--output", work / f"loss {ODD[:30]}.png")
    shell.run("tools/compare_logits", converted, model)

    exported = work / "exported" / ODD
    shell.run("scripts/5_export.sh", out, model, exported)
    question = "$(touch RAN) `touch RAN` 'a' \"b\" * \\ \n;"
    shell.run("scripts/6_generate.sh", exported, question, MAX_NEW_TOKENS=4)
    shell.run("scripts/7_evaluate.sh", exported, rows, LIMIT=2, MAX_NEW_TOKENS=4, OUTPUT=work / f"score {ODD[:30]}.json")
    assert json.loads((work / f"score {ODD[:30]}.json").read_text())

    assert not [path for folder in (work, tiny.ROOT, Path.home()) for path in folder.glob("RAN*")]
    assert not list(work.rglob("RAN"))
    assert not shell.seen_secrets
    for path in work.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret.encode() in content for secret in SECRETS.values()), path


SCRIPTS = sorted(
    str(path.relative_to(tiny.ROOT))
    for folder in ("scripts", "scripts/checkpoints", "scripts/data", "tools")
    for path in (tiny.ROOT / folder).iterdir()
    if path.is_file() and path.suffix in (".sh", "") and path.name != "quickstart.sh"
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_runs_what_is_in_its_arguments(shell: Shell, script: str) -> None:
    """With paths that do not exist, a script fails with a message, whatever their names."""
    arguments = (f"missing {ODD}", "-x$(touch RAN)", "--$(touch RAN)=*")
    # Whatever it reads as options or settings, it fails immediately: none of its input exists.
    settings = dict.fromkeys(("OUTPUT_PATH", "DATA_PATH", "TRAIN_ITERS", "GPUS_PER_NODE"), arguments[0])
    result = subprocess.run(
        ["bash", shell.root / script, *arguments],
        cwd=shell.work,
        env={**shell.environment, **settings},
        capture_output=True,
        text=True,
        timeout=tiny.TIMEOUT_SECONDS,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode != 0, result.stdout
    assert not list(shell.work.rglob("RAN"))


SIZES = ("TENSOR", "PIPELINE", "CONTEXT", "EXPERT")


@pytest.mark.parametrize("name", ["GPUS_PER_NODE", "NNODES", *(f"{size}_PARALLEL_SIZE" for size in SIZES)])
def test_bash_does_not_compute_with_what_is_not_a_number(shell: Shell, name: str) -> None:
    """In arithmetic bash runs the command of an array's subscript, quoted or not."""
    said = shell.run("scripts/4_train.sh", "train", status=2, **{name: "PATH[$(touch RAN)]"})
    assert f"error: {name} is 'PATH[$(touch RAN)]': give a whole number" in said
    assert not list(shell.work.rglob("RAN"))


def test_the_tools_that_take_numbers_do_not_compute_with_anything_else(shell: Shell) -> None:
    for number in ("PATH[$(touch RAN)]", "1; touch RAN", "-1", "1.5"):
        assert "give a whole number" in shell.run("tools/compare_logits", "missing", "missing", number, status=2)
    assert not list(shell.work.rglob("RAN"))
