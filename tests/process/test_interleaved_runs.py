"""Runs with interleaved pipeline stages."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import layout_material, tiny

OPTIONS = ["--split", "90,10,0", "--eval-interval", "5", "--save-interval", "5"]
INTERLEAVED = ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"]


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model of four layers."""
    folder = tmp_path_factory.mktemp("four_layers")
    layout_material.save_models(folder, {"plain"})
    return folder / "plain"


def test_interleaved_and_plain_pipelines_resume_each_other(
    train: Callable[..., Path], four_layers: Path, tmp_path: Path
) -> None:
    one = train(1, *OPTIONS, "--load", four_layers)
    interleaved = train(2, *OPTIONS, *INTERLEAVED, "--load", four_layers)
    assert len(tiny.losses(interleaved)) == 10
    plain = INTERLEAVED[:2]
    for number, (start, processes, sizes) in enumerate([(interleaved, 2, plain), (one, 2, INTERLEAVED)]):
        run = tiny.as_of(5, start, tmp_path / f"resumed_{number}")
        # Some of each stage's layers are recomputed whole, which they were not before.
        whole = ["--recompute-layers", number + 1]
        train(processes, *OPTIONS, *sizes, *whole, "--load", four_layers, mode="resume", save=run)
        for each in (start, run):
            assert tiny.losses(each) == pytest.approx(tiny.losses(one), rel=1e-6)
            assert tiny.validation_losses(each) == pytest.approx(tiny.validation_losses(one), rel=1e-6)
