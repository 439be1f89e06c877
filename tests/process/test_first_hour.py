"""The first hour of a newcomer: every `next:` line runs as printed, every script explains itself, and mistakes are named."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.taught import untrained_folder

SECONDS = 240
SCRIPTS = sorted([*tiny.ROOT.glob("scripts/*.sh"), *tiny.ROOT.glob("tools/*"), *tiny.ROOT.glob("scripts/cluster/*.sbatch")])
SCRIPTS += [tiny.ROOT / "scripts" / "cluster" / f"{name}.sh" for name in ("container", "interactive", "pipeline")]


def environment(**more: object) -> dict[str, str]:
    given = {"MEGATRON_SFT_DEVICE": "cpu", "OMP_NUM_THREADS": 1, "MEGATRON_SFT_PYTHON": sys.executable, "GPUS_PER_NODE": 1}
    return os.environ | {name: str(value) for name, value in (given | more).items()}


def shell(line: str, folder: Path, status: int = 0, **more: object) -> str:
    done = subprocess.run(
        ["bash", "-c", line], env=environment(**more), capture_output=True, text=True, timeout=SECONDS, cwd=folder
    )
    assert done.returncode == status, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_explains_itself(script: Path) -> None:
    said = shell(f"bash {shlex.quote(str(script))} -h", tiny.ROOT)
    assert len(said.splitlines()) >= 3 and "shellcheck" not in said and "#SBATCH" not in said
    assert said[0].isupper() or said.startswith("usage: ")


def copied_repository(folder: Path) -> Path:
    """The scripts and the package, so that recipes and assets of the test stay out of the repository."""
    for name in ("scripts", "tools"):
        shutil.copytree(tiny.ROOT / name, folder / name)
    (folder / "assets").mkdir()
    shutil.copy(tiny.ROOT / "requirements.txt", folder)
    shutil.copy(tiny.ROOT / "assets" / "models.json", folder / "assets")
    shutil.copytree(tiny.ROOT / "megatron", folder / "megatron")
    return folder


def next_line(said: str) -> str:
    found = re.findall(r"^next: (.*)$", said, flags=re.MULTILINE)
    assert found, said
    return str(found[0])


@pytest.mark.timeout(900)
def test_every_next_line_runs_as_it_is_printed(tmp_path: Path) -> None:
    """From a model and a file of chats to answers, by nothing but what the steps say."""
    root = copied_repository(tmp_path / "a clone")
    chats = [
        {"messages": [{"role": "user", "content": f"Sort these names: Tom Ada {n}"}, {"role": "assistant", "content": "Ada"}]}
        for n in range(120)
    ]
    (tmp_path / "my chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    said = shell(f"bash scripts/1_download.sh model {shlex.quote(str(untrained_folder()))}", root)
    assert "2_convert.sh" in next_line(said)
    converted = shell(next_line(said), root)
    assert "then, with your DATA" in converted and "next:" not in converted
    said = shell(f"bash scripts/1_download.sh dataset {shlex.quote(str(tmp_path / 'my chats.jsonl'))}", root)
    tokenized = shell(next_line(said), root)
    assert "note: " in tokenized and "GLOBAL_BATCH_SIZE=" in tokenized, "the data is too small for the default batch"
    made = shell(next_line(tokenized), root)
    planned, trained = re.findall(r"^next: (.*)$", made, flags=re.MULTILINE)
    small = {"TRAIN_ITERS": 2, "PRECISION": "fp32", "SAVE_INTERVAL": 1}
    plan = shell(planned, root, **small)
    assert plan.splitlines()[1] == f"this run can start: {trained}" and "SAVE_INTERVALS=1 " in " ".join(plan.split())
    done = shell(trained, root, **small)
    exported = shell(next_line(done), root)
    shell(next_line(exported), root, MAX_NEW_TOKENS=3)
    # So it is with preference pairs, whose recipe is of DPO.
    pairs = [{"prompt": f"Sort these names: Tom Ada {n}", "chosen": "Ada", "rejected": "Tom"} for n in range(120)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    folder = next(path for path in (root / "assets" / "checkpoints").iterdir() if (path / "config.json").exists())
    preferred = shell(f"bash scripts/3_tokenize.sh {shlex.quote(str(folder))} pairs.jsonl 128", root)
    planned, trained = re.findall(r"^next: (.*)$", shell(next_line(preferred), root), flags=re.MULTILINE)
    assert "OBJECTIVE=dpo" in shell(planned, root, **small)
    assert "margin 0.0000, accuracy" in shell(trained, root, **small)
    # The same name again is refused, and a model that is misspelled is guessed.
    assert "exists: edit it" in shell(next_line(tokenized), root, status=2)
    wrong = folder.with_name(folder.name.swapcase())
    said = shell(f"bash tools/new_recipe other {shlex.quote(str(wrong))} 'my chats.jsonl'", root, status=2)
    assert f"did you mean {folder}?" in said
    # Names of other frameworks, near misses, and settings without effect are named before anything starts.
    typed = {"LEARNING_RATE": "1e-4", "GLOBAL_BATCHSIZE": 4, "KEEP_EVERY": 5, "KEEP_LAST": 0, "EPOCHS": 1}
    plan = " ".join(shell(planned, root, **typed).split())
    for expected in ("did you mean LR?", "did you mean GLOBAL_BATCH_SIZE?", "KEEP_EVERY=5 has no effect: KEEP_LAST=0"):
        assert expected in plan
    assert "EPOCHS=1" in plan
    assert "SAVE_INTERVALS=3 are one setting" in shell(planned, root, status=2, SAVE_INTERVAL=2, SAVE_INTERVALS=3)


def test_the_wrong_kind_of_path_is_named_with_the_command_that_makes_the_right_one(tmp_path: Path) -> None:
    model = untrained_folder()
    line = f"bash {tiny.ROOT}/scripts/4_train.sh plan"
    said = shell(line, tmp_path, status=2, PRETRAIN_CHECKPOINT_PATH=model, DATA_PATH="x", OUTPUT_PATH="y")
    assert f"{model} is a Hugging Face folder: convert it with bash scripts/2_convert.sh {model} 1 1" in said
    chats = tmp_path / "chats.json"
    chats.write_text('{"instruction": "a", "output": "b"}\n' * 2)
    said = shell(line, tmp_path, status=2, PRETRAIN_CHECKPOINT_PATH=model, DATA_PATH=chats, OUTPUT_PATH="y")
    assert f"bash scripts/3_tokenize.sh MODEL {chats} LENGTH" in said
    said = shell(f"bash {tiny.ROOT}/scripts/3_tokenize.sh {model} {chats} 1000000", tmp_path, status=2)
    assert "LENGTH is 1000000, the model has " in said


MISTAKES = {
    "train without a checkpoint": (
        "launch --standalone --nproc-per-node 1 -m megatron.sft.train train --load nowhere --data-path x --save run",
        "PRETRAIN_CHECKPOINT_PATH nowhere does not exist: make it with scripts/2_convert.sh",
    ),
    "train with a word for a number": (
        "launch --standalone --nproc-per-node 1 -m megatron.sft.train train --load nowhere --data-path x --save run --lr abc",
        "LR: invalid float value: 'abc'",
    ),
    "resume of nothing": (
        "launch --standalone --nproc-per-node 1 -m megatron.sft.train resume --load nowhere --data-path x --save run",
        "OUTPUT_PATH run has no checkpoint to resume from",
    ),
    "tokenise with no model": ("tokenize --tokenizer nowhere --input x.json --seq-length 64", "x.json does not exist"),
    "generate": ("generate nowhere hello", "nowhere"),
    "evaluate": ("evaluate nowhere x.json", "nowhere"),
    "new recipe": ("new_recipe mine nowhere x.json", "nowhere"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_that_needs_no_torch_is_named_without_it(mistake: str, tmp_path: Path) -> None:
    """torch takes seconds to import, and on a busy machine half a minute."""
    command, expected = MISTAKES[mistake]
    module, *arguments = command.split()
    program = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv[1:] = sys.argv[2:]; "
        f"runpy.run_module('megatron.sft.{module}', run_name='__main__')"
    )
    python = [sys.executable, "-c", program, module, *arguments]
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT)}
    done = subprocess.run(python, env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert expected in done.stderr.splitlines()[-1]
