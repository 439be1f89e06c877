"""The README's example says what `plan` says."""

import re
from pathlib import Path

from megatron.sft.families.lora import LoRA, chosen_targets
from megatron.sft.families.trained import Trained
from megatron.sft.hf.published_configs import find_architecture, published_configs
from megatron.sft.planning.fitting.memory_fit import CARDS
from megatron.sft.planning.memory import GIB, MemorySettings
from megatron.sft.suggest import fewest_gpus
from tests.process.test_plan import RECIPES, line, plan
from tests.support import tiny


def test_the_readme_shows_what_plan_says_of_its_example(tmp_path: Path) -> None:
    recipe = RECIPES["SFT_Hybrid_R1_1.5B_OpenThoughts_1M"]
    _, output = plan(recipe, ASSETS_DIR=tmp_path, OUTPUT_PATH=tmp_path / "run", GPU_MEMORY_GIB=80)
    readme = (tiny.ROOT / "README.md").read_text()
    assert f"  memory of a GPU  {line(output, 'memory of a GPU')}\n" in readme
    assert f"  fits             {line(output, 'fits')}\n" in readme


def test_the_readme_s_table_of_families_is_what_plan_says() -> None:
    """The fewest GPUs of 80 GB, for every model in it."""
    from megatron.sft.families.registry import FAMILIES, WRAPPERS
    from megatron.sft.planning.layouts import suggest_layouts
    from megatron.sft.planning.memory import num_parameters

    def fewest(model: str, optimizer_precision: str) -> int:
        settings = MemorySettings(16384, optimizer_precision=optimizer_precision)
        architecture, _ = find_architecture(model)
        sizes = (1, 2, 4, 8, 16, 32, 64)
        return next(n for n in sizes if suggest_layouts(architecture, n, int(CARDS["80 GB"] * GIB), settings, 128))

    readme = (tiny.ROOT / "README.md").read_text()
    table = readme.split("| family | `model_type` |")[1].split("\n\n")[0].splitlines()[2:]
    types: set[str] = set()
    for row in table:
        _, model_types, model, parameters, gpus, with_16_bits = (cell.strip() for cell in row.strip("|").split("|"))
        types |= set(re.findall(r"`(\w+)`", model_types))
        assert parameters == f"{num_parameters(find_architecture(model)[0]) / 1e9:.1f} B"
        assert (int(gpus), int(with_16_bits)) == (fewest(model, "fp32"), fewest(model, "bf16")), model
    assert {*FAMILIES, *WRAPPERS} <= types | {f"{name}_text" for name in types}


def test_the_readme_says_the_fewest_gpus_that_the_plan_tool_says() -> None:
    readme = (tiny.ROOT / "README.md").read_text().partition("| family |")[0]
    rows = [line for line in readme.splitlines() if line.startswith("| Qwen")]
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
