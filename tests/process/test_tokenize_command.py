"""`tokenize` and `tools/show_sample` as users start them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron.sft import tokenize
from megatron.sft.data.tokenized import TokenizedRows
from megatron.sft.runtime.errors import run
from tests.support.fork_server import SERVER
from tests.support.material import npm_tokenizer, reasoning_gym_rows, smollm2_folder

ROOT = Path(__file__).parents[2]
GOOD = {"instruction": "What colour is the sky?", "output": "Blue."}
PREFIX = "Tokenized-data-SmolLM2-135M-Instruct-{}_text_document"


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(data: Path, length: object = 512, *options: str) -> list[str]:
    return ["--tokenizer", str(smollm2_folder()), "--input", str(data), "--seq-length", str(length), *options]


def process(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The entry module in a separate process."""
    environment = os.environ | SERVER.python()
    line = [SERVER.python()["MEGATRON_SFT_PYTHON"], "-m", "megatron.sft.tokenize", *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)


def here(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> int:
    """The entry module in this process; its exit status."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    try:
        run(lambda: tokenize.main(arguments))
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_real_rows_become_packed_rows_and_the_numbers_add_up(tmp_path: Path) -> None:
    rows = [row | {"id": index} for index, row in enumerate(reasoning_gym_rows(600))]
    data = write_lines(tmp_path / "data.jsonl", rows)
    result = process(command(data))
    assert result.returncode == 0, result.stderr
    prefix = tmp_path / PREFIX.format(512)
    assert files_in(tmp_path) == sorted([data.name, *(f"{prefix.name}.{ending}" for ending in ("bin", "idx", "json"))])
    packed = TokenizedRows(prefix)
    manifest = packed.manifest
    (source,) = manifest["sources"]
    assert source["read"] == 600 == source["kept"] + sum(source["dropped"].values())
    assert (source["format"], source["file_format"]) == ("instruction", "json lines")
    assert manifest["conversations"] == source["kept"] == sum(len(row.conversation_lengths) for row in packed)
    assert manifest["rows"] == len(packed)
    assert manifest["tokens"] == sum(len(row.tokens) for row in packed)
    assert manifest["trained_tokens"] == sum(int(row.trained.sum()) for row in packed)
    assert max(len(row.tokens) for row in packed) <= 512
    assert manifest["fill"] == manifest["tokens"] / (512 * manifest["rows"]) > 0.95
    assert (manifest["dtype"], manifest["vocab_size"]) == ("uint16", 49152)
    assert manifest["tokenizer"]["end_of_turn_ids"] == [2]
    share = 100 * manifest["trained_tokens"] / manifest["tokens"]
    lines = result.stdout.splitlines()
    conversations, fill = manifest["conversations"], 100 * manifest["fill"]
    assert f"packed {conversations} conversations into {manifest['rows']} rows ({fill:.1f} % full)" in lines
    assert f"trained {share:.1f} % of {manifest['tokens']:,} tokens" in lines
    assert "not used: field 'id' of 600 records" in lines
    assert lines[-1].startswith("next: bash tools/new_recipe ") and lines[-1].endswith(f"{data} 512")
    assert lines[-2].startswith(f"note: few rows ({manifest['rows']}: 1 step of the default GLOBAL_BATCH_SIZE=128): take ")
    assert sum(line.startswith("---- sample") for line in lines) == 2
    assert f"[[{rows[0]['output']}<|im_end|>]]" in result.stdout
    assert "\x1b[" not in result.stdout


def test_same_seed_same_bytes_whatever_the_number_of_threads(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", reasoning_gym_rows(300))
    results = []
    for name, num_workers, seed in (("a", "1", "1"), ("b", "2", "1"), ("c", "2", "2")):
        options = ("--num-workers", num_workers, "--seed", seed, "--output-prefix", str(tmp_path / name))
        assert process(command(data, 512, *options)).returncode == 0
        results.append([(tmp_path / f"{name}.{ending}").read_bytes() for ending in ("bin", "idx")])
    assert results[0] == results[1] != results[2]


def test_the_shell_script_takes_relative_paths_and_variables(tmp_path: Path) -> None:
    write_lines(tmp_path / "data.json", [{"problem": "1+1?", "solution": "2"}] * 3)
    variables = {**SERVER.python(), "PACKING": "0", "OVERLONG": "error", "SEED": "5", "NUM_WORKERS": "1"}
    environment = os.environ | variables | {"MAP_COLUMNS": "problem=instruction solution=output"}
    line = ["bash", str(ROOT / "scripts/3_tokenize.sh"), str(smollm2_folder()), "data.json", "128"]
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    manifest = TokenizedRows(tmp_path / PREFIX.format(128)).manifest
    assert (manifest["rows"], manifest["conversations"], manifest["seed"]) == (3, 3, 5)
    assert manifest["options"] == {
        "overlong": "error",
        "packing": False,
        "columns": {"problem": "instruction", "solution": "output"},
    }


def test_show_sample_prints_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_lines(tmp_path / "data.jsonl", [GOOD, GOOD])
    assert here(monkeypatch, command(data, 256)) == 0
    line = ["bash", str(ROOT / "tools/show_sample"), str(tmp_path / PREFIX.format(256)) + ".bin"]
    environment = os.environ | {**SERVER.python()}
    plain = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
    assert plain.stdout.count("[[Blue.<|im_end|>]]") == 2
    assert "---- conversation 2 of 2: " in plain.stdout
    coloured = subprocess.run(line, env=environment | {"FORCE_COLOR": "1"}, capture_output=True, text=True, timeout=60)
    assert coloured.stdout.count("\x1b[32mBlue.<|im_end|>\x1b[0m") == 2
    missing = subprocess.run([*line, "9"], env=environment, capture_output=True, text=True, timeout=60)
    assert missing.returncode == 2
    assert "row 9 does not exist" in missing.stderr


def test_a_tokenizer_without_template_gets_one_line(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [GOOD])
    result = process(["--tokenizer", str(npm_tokenizer("llama2")), "--input", str(data), "--seq-length", "64"])
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "has no chat template" in line
    assert files_in(tmp_path) == ["data.jsonl"]


@pytest.mark.parametrize("signal_number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_nothing(tmp_path: Path, signal_number: int, status: int) -> None:
    data = write_lines(tmp_path / "data.jsonl", [GOOD] * 400_000)
    line = [sys.executable, "-m", "megatron.sft.tokenize", *command(data)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as running:
        scratch = tmp_path / f".{PREFIX.format(512)}.tokens.tmp"
        deadline = time.monotonic() + 60
        while not (scratch.exists() and scratch.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        running.send_signal(signal_number)
        assert running.wait(timeout=60) == status
        assert running.stderr is not None
        assert running.stderr.read() == b""
    assert files_in(tmp_path) == ["data.jsonl"]
