"""Mixtures as users ask the tokenize script for them, from files and from a hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

from megatron.sft.data.tokenized import TokenizedRows
from tests.support.fork_server import SERVER
from tests.support.hub_server import Hub, HubRepository
from tests.support.material import smollm2_folder

ROOT = Path(__file__).parents[2]


def write(path: Path, num_rows: int, name: str = "row") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"instruction": f"{name} {index}", "output": f"answer {index}"} for index in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_hub_id_without_a_network_gets_one_clear_message() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    line = [sys.executable, "-m", "megatron.sft.tokenize", "--tokenizer", str(smollm2_folder()), "--seq-length", "64"]
    result = subprocess.run([*line, "--input", "owner/name#5"], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    (message,) = result.stderr.splitlines()
    assert message.startswith("error: owner/name is not a file or folder here, and as a hub id: ")


def test_the_manifest_counts_every_source_and_a_folder_is_one(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 50, "first")
    write(tmp_path / "many" / "b.jsonl", 30, "second")
    write(tmp_path / "many" / "deep" / "c.json", 30, "third")
    (tmp_path / "many" / "README.md").write_text("no data")
    line = ["bash", str(ROOT / "scripts/3_tokenize.sh"), str(smollm2_folder()), "a.jsonl#20 many#50%", "128"]
    environment = os.environ | {**SERVER.python(), "OUTPUT_PREFIX": "out/mixed"}
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    manifest = TokenizedRows(tmp_path / "out/mixed").manifest
    first, second = manifest["sources"]
    assert (first["read"], first["rows"], first["amount"]) == (20, 50, "20")
    assert (second["read"], second["rows"], second["amount"]) == (30, 60, "50%")
    assert manifest["conversations"] == 50 == first["kept"] + second["kept"]
    assert "---- read 20 records (20 of 50) of a.jsonl (json lines) ----" in result.stdout
    assert "format: instruction, 30 records" in result.stdout


def test_a_hub_id_is_sampled_like_a_file(tmp_path: Path) -> None:
    lines = [json.dumps({"problem": f"{index}?", "solution": str(index)}) for index in range(40)]
    files = {"train.jsonl": "\n".join(lines).encode(), "test.jsonl": b'{"problem": "no", "solution": "no"}\n'}
    with Hub({"datasets/org/sums": HubRepository(files)}) as hub:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}
        environment |= {"ASSETS_DIR": str(tmp_path / "assets"), "HF_HOME": str(tmp_path / "cache")}
        line = [sys.executable, "-m", "megatron.sft.tokenize", "--tokenizer", str(smollm2_folder())]
        line += ["--seq-length", "128", "--map-column", "problem=instruction", "solution=output"]
        result = subprocess.run(
            [*line, "--input", "org/sums#25%"], env=environment, capture_output=True, text=True, timeout=120
        )
    assert result.returncode == 0, result.stderr
    prefix = tmp_path / "assets/data/org-sums/Tokenized-org-sums-SmolLM2-135M-Instruct-128_text_document"
    (source,) = TokenizedRows(prefix).manifest["sources"]
    assert (source["path"], source["rows"], source["read"], source["kept"]) == ("org/sums", 40, 10, 10)
