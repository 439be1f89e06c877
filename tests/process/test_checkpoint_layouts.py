"""A run saved in one parallel layout goes on in another: every weight and moment bit for bit, and the same losses.

Of all weights, of adapters, and of a part of the weights.

A short part of the 25 pairs runs always; all of them: pytest -m campaign tests/process/test_checkpoint_layouts.py
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.support import tiny
from tests.support.layout_worker import LAYOUTS, OPTIONS, SAVED, stored_tensors

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def _sources(names: list[str], converted: Path, data: Path, folder: Path, more: Sequence[str]) -> dict[str, list[float]]:
    """A run in each layout, checkpoints after SAVED steps and later; returns the losses after that."""
    losses = {}
    for name in names:
        processes, options = LAYOUTS[name]
        arguments = ["--load", converted, "--data-path", data, "--save", folder / name, *OPTIONS, *options, *more]
        tiny.launch(processes, "train", "train", *arguments)
        losses[name] = tiny.losses(folder / name)[SAVED:]
    return losses


def _compare(source: Path, run: Path, losses: list[float]) -> None:
    saved = stored_tensors(source / f"iter_{SAVED:07d}")
    loaded = stored_tensors(run / "again" / f"iter_{SAVED:07d}")
    assert saved.keys() == loaded.keys() and sum(key.startswith("optimizer.state.exp_avg_sq") for key in saved) > 5
    for key, tensor in saved.items():
        if key.endswith(VOCABULARY):  # padded for TP2
            tensor, loaded[key] = tensor[: tiny.VOCAB_SIZE], loaded[key][: tiny.VOCAB_SIZE]
        # Frozen layers have no state, which is not a number here.
        assert torch.equal(tensor.nan_to_num(nan=99.0), loaded[key].nan_to_num(nan=99.0)), f"{key} {run.name}"
        assert "optimizer" in key or not tensor.isnan().any()
        assert "exp_avg" not in key or tensor.any(), f"{key} was never trained"
    assert json.loads((run / "losses.json").read_text()) == pytest.approx(losses, abs=1e-5)


def _check_pairs(
    names: list[str], targets: list[list[str]], converted: Path, data: Path, folder: Path, more: Sequence[str] = ()
) -> None:
    """Every layout of `names` goes on in all of `targets`; those in one list, of as many processes, share a start."""
    losses = _sources(names, converted, data, folder / "runs", more)
    for layouts in targets:
        places = [folder / "runs", folder / "continued", converted, data]
        script = tiny.ROOT / "tests" / "support" / "layout_worker.py"
        tiny.launch_test_worker(LAYOUTS[layouts[0]][0], script, ",".join(layouts), *places, *more)
        for layout in layouts:
            for name in names:
                _compare(folder / "runs" / name, folder / "continued" / f"{name} to {layout}", losses[name])


def test_a_run_of_four_processes_continues_in_two_and_one_of_two_in_others(
    converted: Path, packed_rows: Path, tmp_path: Path
) -> None:
    _check_pairs(["TP2xPP2", "DP2"], [["TP2", "PP2", "DP2"]], converted, packed_rows, tmp_path)


PARTS = {
    "adapters": ["--lora-rank", "4", "--lora-plus", "4", "--lr", "1e-2"],
    "what FREEZE leaves": ["--freeze", "embedding,attention,layers 0"],
}


@pytest.mark.parametrize("part", PARTS)
def test_a_run_that_trains_a_part_continues_in_other_layouts(
    converted: Path, packed_rows: Path, tmp_path: Path, part: str
) -> None:
    _check_pairs(["TP2xPP2"], [["TP2", "DP2"]], converted, packed_rows, tmp_path, PARTS[part])


@pytest.mark.campaign
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", ["all weights", *PARTS])
def test_every_layout_continues_in_every_other(converted: Path, packed_rows: Path, tmp_path: Path, part: str) -> None:
    _check_pairs(list(LAYOUTS), [[name] for name in LAYOUTS], converted, packed_rows, tmp_path, PARTS.get(part, []))
