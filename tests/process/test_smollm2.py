"""The whole way with a real pretrained chat model: SmolLM2-135M-Instruct, its tokenizer, real rows, and its answers."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from tests.support import material, tiny
from tests.support.fork_server import SERVER


@pytest.fixture(scope="module")
def model() -> Path:
    return material.smollm2_folder()


@pytest.fixture(scope="module")
def checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("smollm2") / "SmolLM2_Megatron_TP1PP1"
    tiny.run_module("convert", "--hf-dir", model, "--output", output)
    return output


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (3, 1), (1, 2)])
def test_logits_are_those_of_transformers(model: Path, checkpoint: Path, tp: int, pp: int) -> None:
    sizes = ["--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp]
    output = tiny.launch(tp * pp, "compare_logits", "--load", checkpoint, "--hf-dir", model, *sizes)
    difference = float(output.partition("largest difference of logits: ")[2].split()[0])
    assert difference <= 1e-3


def test_an_untrained_export_is_the_source_bit_for_bit(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    tiny.run_module("export", "--load", checkpoint, "--hf-dir", model, "--output", tmp_path / "export")
    tiny.assert_same_weights(tmp_path / "export", model)
    for path in model.iterdir():
        assert (tmp_path / "export" / path.name).read_bytes() == path.read_bytes()


def test_three_kv_heads_cannot_be_shared_by_two(model: Path, tmp_path: Path) -> None:
    arguments = ["--hf-dir", model, "--output", tmp_path / "out", "--tensor-model-parallel-size", "2"]
    output = tiny.run_module("convert", *arguments, status=2)
    assert output == ("error: TP=2 does not divide the model's 9 attention heads and 3 KV heads: choose TP from 1, 3\n")
    assert list(tmp_path.iterdir()) == []


def test_six_steps_lower_the_loss_and_it_still_knows_paris(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Each step sees all data, so that the loss falls without ups and downs."""
    data = tmp_path / "reasoning.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in material.reasoning_gym_rows(6)))
    tiny.run_module("tokenize", "--tokenizer", model, "--input", data, "--seq-length", "96")
    (manifest,) = tmp_path.glob("Tokenized-*.json")
    num_rows = json.loads(manifest.read_text())["rows"]
    tiny.launch(
        1,
        "train",
        *("--load", checkpoint, "--data-path", manifest.with_suffix(""), "--save", tmp_path / "run"),
        *("--precision", "fp32", "--lr", "1e-5", "--train-iters", "6", "--global-batch-size", num_rows),
    )
    losses = tiny.losses(tmp_path / "run")
    assert len(losses) == 6
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.7 * losses[0], losses
    tiny.run_module("export", "--load", tmp_path / "run", "--hf-dir", model, "--output", tmp_path / "trained")
    answer = tiny.run_module("generate", tmp_path / "trained", "What is the capital of France?", "--max-new-tokens", 24)
    assert "Paris" in answer


WORDS = "river stone apple cloud green winter paper music table horse silver bread summer garden window yellow market forest"
WORDS += " candle island mirror pocket rocket tiger basket castle dragon engine finger hammer jacket kitten ladder monkey"


def write_last_words(path: Path, seed: int, num_rows: int) -> Path:
    """A task that the model does not do by itself: the last of four words, and nothing else."""
    draw = random.Random(seed)
    chosen = [draw.sample(WORDS.split(), 4) for _ in range(num_rows)]
    turns = [(("system", "List."), ("user", f"Last of {', '.join(words)}"), ("assistant", words[-1])) for words in chosen]
    rows = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def script(name: str, *arguments: object, **settings: object) -> str:
    """Run a script with settings in its environment; returns what it printed."""
    done = subprocess.run(
        ["bash", tiny.ROOT / "scripts" / name, *map(str, arguments)],
        env={**os.environ, **SERVER.python(), **{variable: str(value) for variable, value in settings.items()}},
        capture_output=True,
        text=True,
        timeout=tiny.TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_adapters_learn_a_task_as_well_as_all_weights_do(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    """By exact match on questions that were not trained on: none before, all but one or two after."""
    script("3_tokenize.sh", model, write_last_words(tmp_path / "train.jsonl", 1, 48), 112)
    (data,) = tmp_path.glob("Tokenized-*.bin")
    questions = write_last_words(tmp_path / "questions.jsonl", 2, 16)
    settings = {"DATA_PATH": data.with_suffix(""), "PRETRAIN_CHECKPOINT_PATH": checkpoint, "PRECISION": "fp32"}
    settings |= {"TRAIN_ITERS": 8, "GLOBAL_BATCH_SIZE": 3, "MICRO_BATCH_SIZE": 1, "SAVE_INTERVALS": 100}
    kinds: dict[str, dict[str, object]] = {
        "adapters": {"LORA_RANK": 8, "LR": "2e-3", "MIN_LR": "5e-4", "MERGE": 1},
        "weights": {"LR": "1e-4", "MIN_LR": "3e-5"},
    }
    right = {"before": _num_right(model, questions, tmp_path / "before.json")}
    for name, own in kinds.items():
        script("4_train.sh", "train", **settings, **own, OUTPUT_PATH=tmp_path / name)
        script("5_export.sh", tmp_path / name, model, tmp_path / f"{name}_hf", **own)
        right[name] = _num_right(tmp_path / f"{name}_hf", questions, tmp_path / f"{name}.json")
    assert right["before"] == 0 and min(right["adapters"], right["weights"]) >= 14, right
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).rglob("*.distcp")) for name in kinds]
    assert sizes[0] < 0.03 * sizes[1]


def _num_right(model: Path, questions: Path, output: Path) -> int:
    printed = script("7_evaluate.sh", model, questions, MAX_NEW_TOKENS=6, OUTPUT=output)
    return int(printed.partition(" of 16")[0].rpartition("(")[2])
