"""Step 7: exact match of a real tiny model on a data file."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.fork_server import SERVER
from tests.support.taught import TAUGHT, taught_folder

ROOT = Path(__file__).resolve().parents[2]


def evaluate(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [SERVER.python()["MEGATRON_SFT_PYTHON"], "-m", "megatron.sft.evaluate", *map(str, arguments)]
    environment = os.environ | SERVER.python()
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The taught questions; the reference of the last is one that the model does not give."""
    references = [row[1].removeprefix("<short> ") for row in TAUGHT[:3]] + ["Llama"]
    path = tmp_path / "questions.json"
    rows = [{"instruction": row[0], "output": reference} for row, reference in zip(TAUGHT, references, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_mode_and_all_together_are_counted(data, tmp_path):
    output = tmp_path / "results" / "result.json"
    arguments = ("--control", "<short>", "--control", "<think>", "--max-new-tokens", 64, "--output", output)
    done = evaluate(taught_folder(), data, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:3] == ["<short>: exact match 75.0 % (3 of 4)", "<think>: exact match 75.0 % (3 of 4)"]
    result = json.loads(output.read_text())
    assert (result["exact_match"], result["correct"], result["asked"], result["questions"]) == (0.75, 6, 8, 4)
    assert result["modes"][1] == {"control": "<think>", "exact_match": 0.75, "correct": 3, "questions": 4, "unfinished": 0}
    assert result["records"][7] == {
        "question": "Who are you?",
        "control": "<think>",
        "reference": "Llama",
        "answer": "<think> Hm, é. </think> Qwen",
        "final": "Qwen",
        "correct": False,
        "finished": True,
    }


def test_answer_cut_at_the_limit_is_wrong_and_counted(data, tmp_path):
    output = tmp_path / "result.json"
    done = evaluate(taught_folder(), data, "--control", "<short>", "--limit", 2, "--max-new-tokens", 2, "--output", output)
    assert "<short>: exact match 0.0 % (0 of 2, 2 cut at 2 tokens)" in done.stdout
    assert json.loads(output.read_text())["modes"][0]["unfinished"] == 2


def test_benchmark_without_its_package_is_refused_with_what_works():
    done = evaluate(taught_folder(), "gsm8k")
    assert done.returncode == 2
    assert done.stderr.startswith("error: tasks by name need the package lm-eval")
    assert len(done.stderr.splitlines()) == 1


def test_row_without_a_reference_is_named(tmp_path):
    data = tmp_path / "data.json"
    data.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c"}\n')
    done = evaluate(taught_folder(), data)
    assert done.returncode == 2
    assert f"error: {data}, line 2: field 'output' is missing" in done.stderr


def test_script_passes_its_variables_on(data, tmp_path):
    output = tmp_path / "result.json"
    settings = {"CONTROL": "<short> <think>", "LIMIT": "1", "OUTPUT": str(output), **SERVER.python()}
    line = ["bash", str(ROOT / "scripts/7_evaluate.sh"), str(taught_folder()), str(data)]
    subprocess.run(line, env=os.environ | settings, check=True, timeout=120, capture_output=True)
    assert [record["control"] for record in json.loads(output.read_text())["records"]] == ["<short>", "<think>"]
