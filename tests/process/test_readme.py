"""The README's example says what `plan` says."""

from pathlib import Path

from megatron.sft.families.lora import LoRA, chosen_targets
from megatron.sft.families.trained import Trained
from megatron.sft.hf.published_configs import find_architecture, published_configs
from megatron.sft.planning.memory import GIB, MemorySettings
from megatron.sft.planning.memory_fit import CARDS
from megatron.sft.suggest import fewest_gpus
from tests.process.test_plan import RECIPES, line, plan
from tests.support import tiny


def test_the_readme_shows_what_plan_says_of_its_example(tmp_path: Path) -> None:
    recipe = RECIPES["SFT_Hybrid_R1_1.5B_OpenThoughts_1M"]
    _, output = plan(recipe, ASSETS_DIR=tmp_path, OUTPUT_PATH=tmp_path / "run", GPU_MEMORY_GIB=80)
    readme = (tiny.ROOT / "README.md").read_text()
    assert f"  memory of a GPU  {line(output, 'memory of a GPU')}\n" in readme
    assert f"  fits             {line(output, 'fits')}\n" in readme


def test_the_readme_says_the_fewest_gpus_that_the_plan_tool_says() -> None:
    rows = [line for line in (tiny.ROOT / "README.md").read_text().splitlines() if line.startswith("| Qwen")]
    assert len(rows) == 8
    for row in rows:
        name, *numbers = (cell.strip() for cell in row.strip("|").split("|"))
        [id] = [id for id in published_configs() if id.removeprefix("Qwen/").removesuffix("-Instruct") == name]
        architecture, _ = find_architecture(id)
        lora = LoRA(16, 32.0, *chosen_targets(architecture, "all"))
        said = [
            fewest_gpus(architecture, int(CARDS[card] * GIB), MemorySettings(4096, trained=Trained(adapters)), 128)
            for adapters in (None, lora)
            for card in ("24 GB", "48 GB", "80 GB", "141 GB")
        ]
        assert numbers == [str(number) for number in said], name
