"""Commands under the environments of other launchers and of bare shells: one process, which ends, prints and writes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.material import smollm2_folder

ROOT = Path(__file__).resolve().parents[2]
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
# A locale or an encoding is added where it does not meet what else is tried: every start takes seconds.
ENVIRONMENTS: dict[str, dict[str, str]] = {
    # PyTorchJob, PAI-DLC
    "pod, latin-1": {"RANK": "0", "WORLD_SIZE": "2", **MEETING, "PYTHONIOENCODING": "latin-1"},
    "worker pod with torchrun's defaults": {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "PET_NNODES": "2",
        "PET_NODE_RANK": "1",
        "PET_NPROC_PER_NODE": "8",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": "nowhere:29500",
        "PET_MAX_RESTARTS": "3",
        **MEETING,
    },
    "torchrun": {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "3",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "0",
        **MEETING,
        "TORCHELASTIC_RUN_ID": "x",
        "TORCHELASTIC_ERROR_FILE": "/nowhere/error.json",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    },
    "slurm step with mpi": {
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "PMI_RANK": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "1",
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
    },
    "bare, posix locale": {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"},
}


def command(name: str, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script with nothing in the environment but what `name` has."""
    environment = {"PATH": os.environ["PATH"], "MEGATRON_SFT_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "MEGATRON_SFT_DEVICE": "cpu", "NUM_WORKERS": "1", "MAX_NEW_TOKENS": "4"}
    if name.startswith("bare"):
        environment["PATH"] = "/usr/local/bin:/usr/bin:/bin"
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *map(str, arguments)],
        env=environment | ENVIRONMENTS[name],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=tiny.TIMEOUT_SECONDS,
        check=False,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer whose tokens it has."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(**sizes, num_key_value_heads=1, vocab_size=49152, max_position_embeddings=256)
    folder = tiny.save_random(Qwen2ForCausalLM(config), tmp_path_factory.mktemp("environments") / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(smollm2_folder() / name, folder / name)
    return folder


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_step_is_one_process_that_ends_and_prints(name: str, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "你好 ｜"}, {"role": "assistant", "content": "hé ✓"}]
    data.write_text(json.dumps({"messages": turns}, ensure_ascii=False), encoding="utf-8")
    steps = [
        ("2_convert.sh", model, 1, 1, tmp_path / "checkpoint"),
        ("3_tokenize.sh", model, data, 64),
        ("5_export.sh", tmp_path / "checkpoint", model, tmp_path / "export"),
        ("6_generate.sh", tmp_path / "export", "a question ✓"),
    ]
    for step in steps:
        done = command(name, *step)
        assert done.returncode == 0, (step, done.stdout[-800:], done.stderr[-1500:])
        assert ("verified: logits" if step[0] == "2_convert.sh" else "\n") in done.stdout, step
    failed = command(name, "3_tokenize.sh", model, tmp_path / "missing ✓.jsonl", 64)
    assert failed.returncode == 2 and "error: data file" in failed.stderr


@pytest.mark.parametrize("name", ["worker pod with torchrun's defaults", "slurm step with mpi", "bare, posix locale"])
def test_training_starts_its_own_processes_whatever_the_environment_says(name: str, tmp_path: Path) -> None:
    source = tiny.save_qwen2(tmp_path / "model", tied=True)
    tiny.run_module("convert", "--source", source, "--output", tmp_path / "checkpoint")
    prefix = tiny.write_rows(tmp_path / "rows", tiny.random_rows(4, 64), 64)
    settings = {
        "PRETRAIN_CHECKPOINT_PATH": tmp_path / "checkpoint",
        "DATA_PATH": prefix,
        "OUTPUT_PATH": tmp_path / "out",
        "SEQ_LENGTH": 64,
        "TRAIN_ITERS": 1,
        "GLOBAL_BATCH_SIZE": 2,
        "GPUS_PER_NODE": 1,
        "PRECISION": "fp32",
    }
    ENVIRONMENTS["settings"] = ENVIRONMENTS[name] | {key: str(value) for key, value in settings.items()}
    done = command("settings", "4_train.sh", "train")
    assert done.returncode == 0, (done.stdout[-1500:], done.stderr[-1500:])
    assert "done: 1 steps" in done.stdout


def test_a_foreign_rank_does_not_silence_the_process_that_saves(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os\nfrom megatron.sft.runtime.errors import run\nfrom megatron.sft.runtime import ranks\n"
        "def main():\n    ranks.print_rank_0('printed ' + os.environ.get('RANK', 'without'))\n    return 0\nrun(main)\n"
    )
    for name in ("pod, latin-1", "worker pod with torchrun's defaults", "torchrun"):
        environment = os.environ | ENVIRONMENTS[name] | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == "printed without\n"
