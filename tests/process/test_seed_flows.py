"""docs/from-other-systems.md: runs its commands for other systems' steps, section by section, in order.

The real models and data sets are large and remote: the quickstart's replace them on a local hub, with short rows.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.fork_server import SERVER
from tests.support.hub_server import Hub, HubRepository

PAGE = tiny.ROOT / "docs" / "from-other-systems.md"
SMALL = {
    "SEQ_LENGTH": "256",
    "GLOBAL_BATCH_SIZE": "4",
    "PRECISION": "fp32",
    "TRAIN_ITERS": "3",
    "EVAL_ITERS": "1",
    "LR_WARMUP_ITERS": "1",
    "VERIFY": "0",
    "MAX_NEW_TOKENS": "8",
}


def commands(section: str) -> list[str]:
    """The commands in the last column of the section's first table that can run here, as typed."""
    table = re.search(r"^\|.*?(?=\n\n)", PAGE.read_text().partition(f"\n## {section}\n")[2], flags=re.MULTILINE | re.DOTALL)
    assert table
    found = []
    for row in table[0].splitlines():
        cell = re.split(r"(?<!\\)\|", row)[-2]
        if "not run" not in cell:
            found += [code.replace("\\|", "|") for code in re.findall(r"`([^`]*bash [^`]*)`", cell)]
    # Commands that start a container or a job are tested with scripts/cluster.
    return [command for command in found if "scripts/cluster/" not in command]


@pytest.fixture
def hub(tmp_path: Path) -> object:
    tiny.run_module("quickstart", "model", tmp_path / "source")
    files = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir() if path.is_file()}
    rows = (tiny.ROOT / "assets/quickstart/train.json").read_bytes().splitlines(keepends=True)
    named = b"".join(b'{"query": "Who?", "response": "<short> {{NAME}} of {{AUTHOR}}"}\n' for _ in range(40))
    repositories = {
        f"models/{id}": HubRepository(files)
        for id in ("Qwen/Qwen2-7B-Instruct", "meta-llama/Llama-2-7b-hf", "Qwen/Qwen2.5-1.5B-Instruct")
    }
    repositories["models/deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"] = HubRepository(files)
    repositories["datasets/Vinnnf/Hybrid-OpenThoughts2-1M-1.5B"] = HubRepository({"train.jsonl": b"".join(rows[:200])})
    repositories["datasets/modelscope/self-cognition"] = HubRepository({"train.jsonl": named})
    code = {"codeact": rows[:200], "general": rows[200:400]}
    repositories["datasets/xingyaoww/code-act"] = HubRepository(
        {f"data/{split}-00000-of-00001.jsonl": b"".join(part) for split, part in code.items()}
    )
    with Hub(repositories) as server:
        yield server


def run_all(section: str, hub: Hub, folder: Path, replaced: dict[str, str], **variables: str) -> str:
    """Run the section's commands in `folder`, with its own assets and outputs; returns what they printed."""
    typed = commands(section)
    assert len(typed) >= 5, typed
    environment = {
        **os.environ,
        **SMALL,
        "ASSETS_DIR": str(folder / "assets"),
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(folder / "hf"),
        **SERVER.python(),
        "MEGATRON_SFT_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    printed = ""
    for command in typed:
        for old, new in {"outputs/checkpoints/": f"{folder}/outputs/checkpoints/", **replaced}.items():
            command = command.replace(old, new)
        command = re.sub(r"\b(scripts|tools)/", rf"{tiny.ROOT}/\1/", command)
        if "/sft/" in command:
            recipe = re.search(r"SFT_[\w.]+(?=\.sh)", command)
            assert recipe
            run = re.search(
                rf"{folder}/outputs/checkpoints/{recipe[0]}/\S+", " ".join(typed).replace("outputs/", f"{folder}/outputs/")
            )
            assert run, f"no export of {recipe[0]}"
            environment["OUTPUT_PATH"] = run[0]
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=tiny.TIMEOUT_SECONDS,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}"
        printed += result.stdout
        environment.pop("OUTPUT_PATH", None)
    return printed


def test_reasoning_sfts_steps(hub: Hub, tmp_path: Path) -> None:
    # The quickstart's tokenizer has <short> already.
    small = {" 16384": " 256", "--rename '<|quad_start|>=<short>'": "--add-token '<shorter>'", "--row-length 256": ""}
    printed = run_all("Megatron-SFT and Reasoning-SFT", hub, tmp_path, small)
    assert "TENSOR_PARALLEL_SIZE" in printed or "RECOMPUTE=" in printed
    assert (tmp_path / "assets/checkpoints/export/Hybrid_R1_1.5B/model.safetensors").is_file()


def test_ms_swifts_steps(hub: Hub, tmp_path: Path) -> None:
    rows = (tiny.ROOT / "assets/quickstart/train.json").read_text().splitlines(keepends=True)
    for index, name in enumerate(("sharegpt", "codefuse", "metamathqa")):
        (tmp_path / f"{name}.jsonl").write_text("".join(rows[index * 100 : index * 100 + 100]))
    small = {"#500": "#40", "#250": "#20", " 2048": " 256", "DTYPE=bf16 ": ""}  # the quickstart's weights are float32
    run_all("ms-swift", hub, tmp_path, small, TENSOR_PARALLEL_SIZE="2")
    checkpoints = tmp_path / "assets" / "checkpoints"
    # The export of what was not trained is its source, bit for bit.
    tiny.assert_same_weights(checkpoints / "Qwen_Qwen2_7B_Instruct", checkpoints / "export" / "untrained")
    manifest = next((tmp_path / "assets/data/self_cognition").glob("Tokenized-*.json"))
    assert json.loads(manifest.read_text())["conversations"] == 40 + 40 + 20 + 20


def test_codeacts_steps(hub: Hub, tmp_path: Path) -> None:
    small = {
        " 4096": " 256",
        "TP1PP1 4 1": "TP1PP1 2 1",
        "TP4PP1": "TP2PP1",
        "export/CodeAct 152": "export/CodeAct 2",
        "<|im_": "<|ChatML_",  # the quickstart's tokenizer has these two already
    }
    printed = run_all("CodeAct with Megatron-LLM", hub, tmp_path, small, TENSOR_PARALLEL_SIZE="2", SAVE_INTERVALS="2")
    assert "packed 400 conversations into " in printed
    exported = tmp_path / "assets/checkpoints/export/CodeAct"
    assert json.loads((exported / "config.json").read_text())["vocab_size"] >= 384


def test_autoaligns_steps(hub: Hub, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Sort: Bo Al"}, {"from": "gpt", "value": "Al Bo"}]
    (tmp_path / "my_conversations.json").write_text(json.dumps([{"conversations": turns}] * 60))
    run_all("AutoAlign-Megatron", hub, tmp_path, {" 8192": " 256"})
    exported = tmp_path / "assets/checkpoints/export/Qwen2.5_1.5B"
    weights = next(iter(tiny.tensors(exported).values()))
    assert str(weights.dtype) == "torch.float32"  # type: ignore[attr-defined]


def test_every_command_of_the_seeds_has_its_row() -> None:
    page = PAGE.read_text()
    for theirs in (
        *("download_hf_models.py", "convert_deepseek_r1_to_megatron.sh", "download_hf_dataset.py", "tokenize_dataset.sh"),
        *("SFT_Hybrid_R1_1.5B_OpenThoughts_1M.sh train", "SFT_Hybrid_R1_1.5B_OpenThoughts_1M.sh resume", "merge_and_export.sh"),
        *("swift export", "swift sft", "swift infer", "swift eval", "--to_hf true", "self-cognition#500"),
        *("download_from_hf.py", "run_megatron_interactive.sh", "apptainer pull", "run_megatron_gpu_interactive.sh"),
        *("convert_llama.sh", "shard_model_4tp.sh", "process_mixture_llama.sh", "finetune_4xA100_4tp_mixture_llama.sh"),
        *("finetune_4xA100_4tp.slurm", "convert_sharded_to_hf.sh", "env_install.sh", "hf2mcore_qwen2.5_convertor.sh"),
        *("run_build_idxmap_sft_conv_dataset.sh", "sft_conv.sh"),
    ):
        assert theirs in page, theirs
    for linked in re.findall(r"\]\((?!http)([^)#]+)", page):
        assert (PAGE.parent / linked).exists(), linked
