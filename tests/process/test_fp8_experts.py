"""Mixtures whose experts are computed in 8 bits, over processes, recomputed and with adapters; `-m gpu`: with GPU kernels."""

from pathlib import Path

import pytest

from tests.support import tiny, tiny_families

WORKER = tiny.ROOT / "tests" / "support" / "fp8_experts_worker.py"


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of a mixture without and one with biases of experts."""
    folder = tmp_path_factory.mktemp("mixtures")
    return [tiny_families.save_family(folder / family, family) / "config.json" for family in ("qwen3_moe", "gpt_oss")]


def test_experts_in_8_bits_are_near_those_in_32_and_the_same_over_processes_recomputed_and_with_adapters(
    configs: list[Path],
) -> None:
    assert tiny.launch_test_worker(2, WORKER, *configs).count("equal") == 2


@pytest.mark.gpu
def test_the_same_on_a_gpu(configs: list[Path]) -> None:
    assert tiny.run_on_gpu(1, str(WORKER), *configs).count("equal") == 1


def test_a_run_with_experts_in_8_bits_is_near_bf16_and_resumes_in_another_layout(packed_rows: Path, tmp_path: Path) -> None:
    """A resumed run casts the weights that it loads: one whose casts were older than its weights would differ from it."""
    model = tiny_families.save_family(tmp_path / "model", "qwen3_moe")
    tiny.run_module("convert", "--source", model, "--output", tmp_path / "checkpoint")
    train = tiny.ROOT / "tests" / "support" / "fp8_train.py"
    options = ["--load", tmp_path / "checkpoint", "--data-path", packed_rows, "--global-batch-size", 8, "--micro-batch-size", 2]
    options += ["--lr", "1e-3", "--min-lr", "1e-3", "--lr-decay-style", "constant", "--train-iters", 4]
    fp8 = [*options, "--precision", "fp8"]
    tiny.launch(1, "train", "train", *options, "--precision", "bf16", "--save", tmp_path / "bf16")
    tiny.launch_test_worker(1, train, "train", *fp8, "--save", tmp_path / "whole", "--save-interval", 2)
    pipeline = ["--pipeline-model-parallel-size", 2, "--recompute", "selective"]
    tiny.launch_test_worker(
        2, train, "resume", *fp8, *pipeline, "--save", tiny.as_of(2, tmp_path / "whole", tmp_path / "stages")
    )
    experts = ["--expert-model-parallel-size", 2]
    tiny.launch_test_worker(2, train, "train", *fp8, *experts, "--save", tmp_path / "spread")
    bf16, whole, stages, spread = (tiny.losses(tmp_path / name) for name in ("bf16", "whole", "stages", "spread"))
    assert whole == pytest.approx(bf16, rel=1e-3) and whole != pytest.approx(bf16, rel=1e-5)
    assert stages == pytest.approx(whole, rel=1e-7)
    assert spread == pytest.approx(whole, rel=1e-3)
