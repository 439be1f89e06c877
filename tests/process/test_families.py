"""Every model family: bit-equal through Megatron and back in any layout, and transformers' logits and gradients on the way."""

from pathlib import Path

import pytest

from tests.support import export_grid, tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny random models, one of every architecture."""
    folder = tmp_path_factory.mktemp("families")
    for family in tiny.FAMILIES:
        tiny.save_family(folder / family, family)
    return folder


@pytest.fixture(scope="module")
def exported(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """The torch_dist checkpoints, and a line `family format TP PP EP` for every export that was its source bit for bit."""
    out = tmp_path_factory.mktemp("checkpoints")
    output = tiny.run_script(Path(export_grid.__file__), models, out)
    assert output.endswith("done\n"), output
    return out, {line.removeprefix("equal ") for line in output.splitlines() if line.startswith("equal ")}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_layout_and_format_exports_to_the_source_bit_for_bit(family: str, exported: tuple[Path, set[str]]) -> None:
    equal = {line for line in exported[1] if line.startswith(f"{family} ")}
    experts = "moe" in family or "mixtral" in family
    assert len(equal) == (12 if experts else 10), equal


@pytest.mark.parametrize(
    ("tp", "pp", "ep", "sp"), [(1, 1, 1, 0), (2, 2, 1, 1), (4, 1, 1, 1), (1, 4, 1, 0), (2, 1, 2, 1), (1, 1, 4, 0)]
)
def test_logits_and_gradients_are_those_of_transformers(
    models: Path, exported: tuple[Path, set[str]], tp: int, pp: int, ep: int, sp: int
) -> None:
    """Conversations longer than the window, short ones, RoPE scaled and not, experts spread and not."""
    worker = tiny.ROOT / "tests" / "support" / "conversion_worker.py"
    processes = max(tp * pp, ep)
    output = tiny.launch_test_worker(processes, worker, tp, pp, ep, sp, models, exported[0])
    lines = [line.split() for line in output.splitlines() if line.startswith("result ")]
    expected = [name for name in tiny.FAMILIES if ep == 1 or "moe" in name or "mixtral" in name]
    assert sorted(line[1] for line in lines) == sorted(expected)
    for _, family, logits, gradients, name in lines:
        assert float(logits) <= 1e-4 and float(gradients) <= 1e-4, (family, logits, gradients, name)


def test_experts_train_and_resume_over_ep_and_tp_as_on_one_process(
    exported: tuple[Path, set[str]], packed_rows: Path, tmp_path: Path
) -> None:
    options = ["--load", exported[0] / "mixtral", "--data-path", packed_rows, "--precision", "fp32"]
    options += ["--lr", "1e-3", "--min-lr", "1e-3", "--lr-decay-style", "constant", "--global-batch-size", "8"]
    one = ["--save", tmp_path / "one", "--train-iters", "4"]
    tiny.launch(1, "train", "train", *options, *one)
    spread = [*options, "--save", tmp_path / "spread", "--expert-model-parallel-size", "2"]
    tiny.launch(2, "train", "train", *spread, "--train-iters", "2")
    tiny.launch(2, "train", "resume", *spread, "--train-iters", "4", "--tensor-model-parallel-size", "2")
    assert tiny.losses(tmp_path / "spread") == pytest.approx(tiny.losses(tmp_path / "one"), rel=1e-5)
