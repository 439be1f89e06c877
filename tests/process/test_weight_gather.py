"""Weights that other copies of the model stepped are there before a layer uses them."""

import json
from pathlib import Path

from tests.support import tiny, tiny_families

WORKER = tiny.ROOT / "tests" / "support" / "gather_worker.py"


def test_a_layer_begins_when_all_of_its_weights_are_gathered(tmp_path: Path) -> None:
    """Also of modules whose methods it calls, such as a gated delta net's convolution."""
    source = tiny_families.save_family(tmp_path / "hf", "qwen3_next")
    tiny.run_module("convert", "--hf-dir", source, "--output", tmp_path / "model")
    tiny.write_rows(tmp_path / "rows", tiny.random_rows(24, 64), length=64)
    arguments = ["--load", tmp_path / "model", "--data-path", tmp_path / "rows", "--save", tmp_path / "run"]
    arguments += ["--train-iters", 3, "--global-batch-size", 4, "--lr", 1e-3, "--min-lr", 1e-4]
    tiny.launch_test_worker(2, WORKER, tmp_path / "counts", *arguments)
    for rank in range(2):
        counts = json.loads((tmp_path / f"counts.{rank}").read_text())
        assert counts["begun"] and not counts["early"], counts
