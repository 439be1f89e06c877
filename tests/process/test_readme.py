"""The README's example says what `plan` says."""

from pathlib import Path

from tests.process.test_plan import RECIPES, line, plan
from tests.support import tiny


def test_the_readme_shows_what_plan_says_of_its_example(tmp_path: Path) -> None:
    recipe = RECIPES["SFT_Hybrid_R1_1.5B_OpenThoughts_1M"]
    _, output = plan(recipe, ASSETS_DIR=tmp_path, OUTPUT_PATH=tmp_path / "run", GPU_MEMORY_GIB=80)
    readme = (tiny.ROOT / "README.md").read_text()
    assert f"  memory of a GPU  {line(output, 'memory of a GPU')}\n" in readme
    assert f"  fits             {line(output, 'fits')}\n" in readme
