"""The whole way with a real pretrained chat model: SmolLM2-135M-Instruct, its tokenizer, real rows, and its answers."""

import json
from pathlib import Path

import pytest

from tests.support import material, tiny


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
