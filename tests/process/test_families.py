"""Every model family: bit-equal through Megatron and back in any layout, and transformers' logits and gradients on the way.

In CI the families of `EVERYWHERE` are tried in every layout, the others in two; -m campaign tries all in all.
"""

from pathlib import Path

import pytest

from tests.support import export_grid, tiny, tiny_families
from tests.support.tiny_families import has_experts

EVERYWHERE = [
    "qwen2", "qwen2_tied_bf16", "llama2_bf16", "llama3", "llama32_tied", "mistral_window", "mistral", "qwen3_bf16",
    "qwen3_tied", "qwen3_moe", "qwen3_moe_unnormalised", "mixtral",
]  # fmt: skip
OTHERS = [family for family in tiny_families.FAMILIES if family not in EVERYWHERE]
# Of them, those with something in their experts that no other has: over expert-parallel ranks too.
SPREAD = ["gpt_oss", "glm4_moe_bf16"]
# The layouts of OTHERS in CI.
SAMPLE = [(1, 1, 1, 0), (2, 2, 1, 1)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny random models, one of every architecture."""
    folder = tmp_path_factory.mktemp("families")
    for family in tiny_families.FAMILIES:
        tiny_families.save_family(folder / family, family)
    return folder


def export_all(models: Path, out: Path, everywhere: list[str]) -> set[str]:
    """A line `family format TP PP EP` for every export that was its source bit for bit."""
    output = tiny.run_script(Path(export_grid.__file__), models, out, *everywhere)
    assert output.endswith("done\n"), output
    return {line.removeprefix("equal ") for line in output.splitlines() if line.startswith("equal ")}


@pytest.fixture(scope="module")
def exported(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """The torch_dist checkpoints, and the lines of `export_all`."""
    out = tmp_path_factory.mktemp("checkpoints")
    return out, export_all(models, out, EVERYWHERE)


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_every_layout_and_format_exports_to_the_source_bit_for_bit(family: str, exported: tuple[Path, set[str]]) -> None:
    equal = {line for line in exported[1] if line.startswith(f"{family} ")}
    number = 1 + len(export_grid.SAMPLE) if family in OTHERS else 12 if has_experts(family) else 10
    assert len(equal) == number, equal


def compare(models: Path, checkpoints: Path, layout: tuple[int, int, int, int], families: list[str]) -> None:
    """Compare with transformers in one launch. `layout`: TP, PP, EP, and 1 for sequence parallelism."""
    tp, pp, ep, _ = layout
    worker = tiny.ROOT / "tests" / "support" / "conversion_worker.py"
    output = tiny.launch_test_worker(max(tp, ep) * pp, worker, *layout, models, checkpoints, *families)
    lines = [line.split() for line in output.splitlines() if line.startswith("result ")]
    assert sorted(line[1] for line in lines) == sorted(name for name in families if ep == 1 or has_experts(name))
    for _, family, logits, gradients, influence, name in lines:
        assert float(logits) <= 1e-4 and float(gradients) <= 1e-4, (family, logits, gradients, name)
        # Which tokens an expert multiplies together depends on the others, and so does how its products are rounded.
        assert float(influence) <= (1e-5 if has_experts(family) else 0), (family, influence)


@pytest.mark.parametrize(
    "layout", [(1, 1, 1, 0), (2, 2, 1, 1), (4, 1, 1, 1), (1, 4, 1, 0), (2, 1, 2, 1), (1, 1, 4, 0)], ids=str
)
def test_logits_and_gradients_are_those_of_transformers_and_neighbors_do_not_count(
    models: Path, exported: tuple[Path, set[str]], layout: tuple[int, int, int, int]
) -> None:
    """Conversations longer than the window, short ones, RoPE scaled and not, experts spread and not."""
    compare(models, exported[0], layout, EVERYWHERE + (OTHERS if layout in SAMPLE else SPREAD if layout[2] == 2 else []))


@pytest.mark.campaign
@pytest.mark.timeout(3000)
def test_the_other_families_in_every_layout(models: Path, tmp_path: Path) -> None:
    equal = export_all(models, tmp_path, OTHERS)
    numbers = {family: 12 if has_experts(family) else 10 for family in OTHERS}
    assert {family: sum(line.startswith(f"{family} ") for line in equal) for family in OTHERS} == numbers
    for tp, pp, sp in ((1, 2, 0), (1, 4, 0), (2, 1, 0), (2, 1, 1), (2, 2, 0), (4, 1, 0), (4, 1, 1)):
        compare(models, tmp_path, (tp, pp, 1, sp), OTHERS)
    for tp, pp, ep, sp in ((1, 1, 2, 0), (1, 1, 4, 0), (2, 1, 2, 1), (2, 2, 2, 1), (1, 2, 2, 0)):
        compare(models, tmp_path, (tp, pp, ep, sp), OTHERS)


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


def test_gated_delta_nets_norms_over_projections_and_latent_attention_train_and_resume_in_another_layout_as_on_one_process(
    exported: tuple[Path, set[str]], packed_rows: Path, tmp_path: Path
) -> None:
    """Layers of two kinds, and weights that only these models split over TP, with their optimizer state."""
    for family in ("qwen3_5", "olmo3", "deepseek_v3_moe"):
        options = ["--load", exported[0] / family, "--data-path", packed_rows, "--precision", "fp32"]
        options += ["--lr", "1e-3", "--min-lr", "1e-3", "--lr-decay-style", "constant", "--global-batch-size", "8"]
        tiny.launch(1, "train", "train", *options, "--save", tmp_path / f"{family}-one", "--train-iters", "4")
        split = [*options, "--save", tmp_path / family]
        tiny.launch(
            4, "train", "train", *split, "--train-iters", "2", "--tensor-model-parallel-size", "2", "--recompute", "full"
        )
        pipeline = ["--pipeline-model-parallel-size", "2", "--recompute", "selective"]
        tiny.launch(2, "train", "resume", *split, "--train-iters", "4", *pipeline)
        assert tiny.losses(tmp_path / family) == pytest.approx(tiny.losses(tmp_path / f"{family}-one"), rel=1e-5)
