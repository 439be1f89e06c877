"""The hybrid example, every command typed as the README of the project it comes from has it, and the folders they leave."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.hub_server import Hub, HubRepository

MODEL, DATA = "deepseek_ai_DeepSeek_R1_Distill_Qwen_1.5B", "Vinnnf-Hybrid-OpenThoughts2-1M-1.5B"
# The example's model and data set are far away and large: the quickstart's stand in for them on a local hub.
SMALL = {"SEQ_LENGTH": "256", "GLOBAL_BATCH_SIZE": "4", "PRECISION": "fp32", "EVAL_ITERS": "1", "LR_WARMUP_ITERS": "1"}


@pytest.fixture
def hub(tmp_path: Path) -> object:
    tiny.run_module("quickstart", "model", tmp_path / "source")
    model = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir() if path.is_file()}
    rows = json.loads((tiny.ROOT / "assets/quickstart/train.json").read_text().splitlines()[0])
    assert set(rows) == {"instruction", "output"}
    lines = (tiny.ROOT / "assets/quickstart/train.json").read_bytes().splitlines(keepends=True)[:400]
    repositories = {
        "models/deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": HubRepository(model),
        "datasets/Vinnnf/Hybrid-OpenThoughts2-1M-1.5B": HubRepository({"train.jsonl": b"".join(lines)}),
    }
    with Hub(repositories) as server:
        yield server


def test_the_hybrid_example_runs_as_typed(hub: Hub, tmp_path: Path) -> None:
    assets = tmp_path / "assets"
    environment = {
        **os.environ,
        **SMALL,
        "ASSETS_DIR": str(assets),
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "hf"),
        "MEGATRON_SFT_PYTHON": sys.executable,
        "MEGATRON_SFT_DEVICE": "cpu",
        "OUTPUT_PATH": str(tmp_path / "run"),
        "OMP_NUM_THREADS": "1",
    }

    def type_in(command: str, **variables: str) -> str:
        result = subprocess.run(
            shlex.split(command.replace(" assets/", f" {assets}/")),
            cwd=tiny.ROOT,
            env={**environment, **variables},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=tiny.TIMEOUT_SECONDS,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}"
        return result.stdout

    type_in("python scripts/checkpoints/download_hf_models.py --model-card deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")
    model = assets / "checkpoints" / MODEL
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= _names(model)
    type_in("bash scripts/checkpoints/convert_deepseek_r1_to_megatron.sh 1.5B 1 1")
    checkpoint = assets / "checkpoints" / f"{MODEL}_Megatron_TP1PP1"
    assert _names(checkpoint) == {"iter_0000001", "latest_checkpointed_iteration.txt"}
    assert (checkpoint / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt").is_file()
    type_in("bash scripts/data/download_hf_dataset.py --dataset-card Vinnnf/Hybrid-OpenThoughts2-1M-1.5B")
    data = assets / "data" / DATA
    assert f"{DATA}.json" in _names(data)
    type_in(f"bash scripts/data/tokenize_dataset.sh assets/checkpoints/{MODEL} assets/data/{DATA}/{DATA}.json 256")
    prefix = f"Tokenized-{DATA}-{MODEL}-256_text_document"
    assert {f"{prefix}.bin", f"{prefix}.idx", f"{prefix}.json"} <= _names(data)
    recipe = "bash scripts/sft/SFT_Hybrid_R1_1.5B_OpenThoughts_1M.sh"
    type_in(f"{recipe} train", TRAIN_ITERS="4")
    type_in(f"{recipe} resume", TRAIN_ITERS="6")
    run = tmp_path / "run"
    assert {"iter_0000004", "iter_0000006", "metrics.jsonl", "settings.json"} <= _names(run)
    assert "SFT_Hybrid_R1_1.5B_OpenThoughts_1M.sh" in _names(run)
    export = "assets/checkpoints/export/Hybrid_R1_1.5B"
    type_in(f"bash scripts/checkpoints/merge_and_export.sh {run} assets/checkpoints/{MODEL} {export}")
    exported = assets / "checkpoints" / "export" / "Hybrid_R1_1.5B"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= _names(exported)
    assert json.loads((exported / "config.json").read_text()) == json.loads((model / "config.json").read_text())


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
