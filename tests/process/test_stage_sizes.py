"""The weights of each process of a layout, counted in real processes."""

from pathlib import Path

import pytest

from tests.support import tiny, tiny_families


@pytest.mark.parametrize(
    ("family", "tensor", "pipeline", "expert"),
    [
        ("qwen2", 2, 2, 1),
        ("qwen2_tied_bf16", 1, 2, 1),
        ("qwen3_moe", 1, 1, 2),
        ("glm4_moe_bf16", 2, 1, 2),
        ("qwen2_moe", 1, 2, 1),
        ("gpt_oss", 2, 1, 1),
    ],
)
def test_each_process_has_as_many_weights_as_estimated(
    family: str, tensor: int, pipeline: int, expert: int, tmp_path: Path
) -> None:
    folder = tiny_families.save_family(tmp_path / family, family)
    worker = tiny.ROOT / "tests" / "support" / "stage_sizes.py"
    count = max(tensor * pipeline, expert)
    tiny.launch_test_worker(count, worker, folder / "config.json", tensor, pipeline, expert)


def test_the_plan_tool_reads_a_folder_and_says_what_it_does_not_know(tiny_qwen2: Path) -> None:
    assert "RECOMPUTE=none  (DP 2)" in tiny.run_module("suggest", tiny_qwen2, "--gpus", 2, "--row-length", 512)
    unknown = tiny.run_module("suggest", "someone/else", status=2)
    assert unknown.startswith("error: someone/else is neither a folder with a config.json nor one of ")
    one_and_a_half_billion = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    small = tiny.run_module("suggest", one_and_a_half_billion, "--gpus", 1, "--gpu-memory", 24, status=2)
    assert "1 GPU of 23.6 GiB" in small
    asked = ("--gpus", 4, "--gpu-memory", "L40S", "--row-length", "4096,16384")
    both = tiny.run_module("suggest", one_and_a_half_billion, *asked, "--tensor-parallel", 2)
    assert "rows of 4,096 tokens" in both and "rows of 16,384 tokens" in both and "4 GPUs of 44.5 GiB" in both
    layouts = [line for line in both.splitlines() if "(DP " in line]
    assert layouts and all("TENSOR_PARALLEL_SIZE=2" in line for line in layouts)
    none = tiny.run_module("suggest", one_and_a_half_billion, *asked, "--tensor-parallel", 3, status=2)
    assert "nothing fits 4 GPUs with --tensor-parallel 3: what fits is TP " in none
