"""The weights of each process of a layout, counted in real processes."""

from pathlib import Path

import pytest

from tests.support import tiny


@pytest.mark.parametrize(
    ("family", "tensor", "pipeline", "expert"),
    [("qwen2", 2, 2, 1), ("qwen2_tied_bf16", 1, 2, 1), ("qwen3_moe", 1, 1, 2)],
)
def test_each_process_has_as_many_weights_as_estimated(
    family: str, tensor: int, pipeline: int, expert: int, tmp_path: Path
) -> None:
    folder = tiny.save_family(tmp_path / family, family)
    worker = tiny.ROOT / "tests" / "support" / "stage_sizes.py"
    count = max(tensor * pipeline, expert)
    tiny.launch_test_worker(count, worker, folder / "config.json", tensor, pipeline, expert)
