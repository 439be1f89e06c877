"""Checkpoints of models whose gradient buffer has several buckets with padding between them."""

from pathlib import Path

from tests.support import tiny


def test_tied_embeddings_over_two_stages_resume_exactly(tiny_qwen2_tied: Path, packed_rows: Path, tmp_path: Path) -> None:
    """The shared embedding has a bucket of its own; the one before it is padded."""
    checkpoint, whole, halves = tmp_path / "checkpoint", tmp_path / "whole", tmp_path / "halves"
    tiny.run_module("convert", "--hf-dir", tiny_qwen2_tied, "--output", checkpoint)
    options = ["--load", checkpoint, "--data-path", packed_rows, "--precision", "fp32", "--lr", "1e-3"]
    options += ["--train-iters", "8", "--global-batch-size", "8", "--save-interval", "4"]
    one = tmp_path / "one"
    tiny.launch(1, "train", *options, "--save", one)
    tiny.launch(2, "train", *options, "--save", whole, "--pipeline-model-parallel-size", "2")
    assert max(abs(a - b) for a, b in zip(tiny.losses(whole), tiny.losses(one), strict=True)) < 1e-5
    tiny.as_of(4, whole, halves)
    tiny.launch(2, "train", *options, "--save", halves, "--pipeline-model-parallel-size", "2")
    assert tiny.losses(halves) == tiny.losses(whole)
    for run in (halves, whole, one):
        tiny.run_module("export", "--load", run, "--hf-dir", tiny_qwen2_tied, "--output", tmp_path / f"{run.name}_hf")
    tiny.assert_same_weights(tmp_path / "halves_hf", tmp_path / "whole_hf")
