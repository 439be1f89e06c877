"""Paths in a recipe mean to bash what they are, whatever characters they have."""

import subprocess
from pathlib import Path

import pytest

from megatron.sft.new_recipe import ROOT, in_repository


@pytest.mark.parametrize(
    "name",
    ["a b", "it's  {one}", "$HOME", "$(touch x)", "`id`", 'a "q"', "back\\slash", "}{", "'}$x`\"\\", "*", "#1", "~", "数据"],
)
@pytest.mark.parametrize("folder", [Path("/data"), ROOT / "assets"])
def test_a_path_in_a_recipe_is_that_path(folder: Path, name: str, tmp_path: Path) -> None:
    script = f'ROOT={ROOT}\n: "${{DATA_PATH:={in_repository(folder / name)}}}"\nprintf %s "$DATA_PATH"'
    ran = subprocess.run(["bash", "-eu", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=20, check=True)
    assert ran.stdout == str(folder / name)
    assert not list(tmp_path.iterdir())
