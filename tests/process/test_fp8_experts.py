"""Mixtures whose experts are computed in 8 bits, over processes, recomputed and with adapters; `-m gpu`: with GPU kernels."""

from pathlib import Path

import pytest

from tests.support import tiny

WORKER = tiny.ROOT / "tests" / "support" / "fp8_experts_worker.py"


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of a mixture without and one with biases of experts."""
    folder = tmp_path_factory.mktemp("mixtures")
    return [tiny.save_family(folder / family, family) / "config.json" for family in ("qwen3_moe", "gpt_oss")]


def test_experts_in_8_bits_are_near_those_in_32_and_the_same_over_processes_recomputed_and_with_adapters(
    configs: list[Path],
) -> None:
    assert tiny.launch_test_worker(2, WORKER, *configs).count("equal") == 2


@pytest.mark.gpu
def test_the_same_on_a_gpu(configs: list[Path]) -> None:
    assert tiny.run_on_gpu(1, str(WORKER), *configs).count("equal") == 1
