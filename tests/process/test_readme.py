"""The README's commands run, and its examples and tables say what `plan` says."""

import re
from pathlib import Path

import pytest

from megatron.sft.families.lora import LoRA, chosen_targets
from megatron.sft.families.trained import Trained
from megatron.sft.hf.published_configs import find_architecture, published_configs
from megatron.sft.planning.fitting.memory_fit import CARDS
from megatron.sft.planning.memory import GIB, MemorySettings
from megatron.sft.suggest import fewest_gpus
from tests.process.test_first_hour import copied_repository, shell
from tests.process.test_plan import RECIPES, line, plan
from tests.support import tiny
from tests.support.hub_server import Hub, HubRepository

MODEL = "deepseek_ai_DeepSeek_R1_Distill_Qwen_1.5B"
DATA = "assets/data/Vinnnf-Hybrid-OpenThoughts2-1M-1.5B/Vinnnf-Hybrid-OpenThoughts2-1M-1.5B.json"
RUN = "SFT_Hybrid_R1_1.5B_OpenThoughts_1M/train_iters_17000"


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


# What the quickstart's model and data, on a hub of this machine, need other values for; it has no token to rename.
REPLACED = {
    " 16384": " 256",
    "--rename '<|quad_start|>=<short>'": "--add-token '<shorter>'",
    "my_questions.jsonl": str(tiny.ROOT / "assets" / "quickstart" / "heldout.json"),
    "bash tools/plan MODEL": f"bash tools/plan {tiny.ROOT}/assets/quickstart/config.json",
    "bash tools/new_recipe NAME MODEL DATA.json": f"bash tools/new_recipe mine assets/checkpoints/{MODEL} {DATA}",
    "HF_DIR=MODEL bash scripts/2_convert.sh CKPT 2 1 OUT": f"HF_DIR=assets/checkpoints/{MODEL} "
    f"bash scripts/2_convert.sh assets/checkpoints/{MODEL}_Megatron_TP1PP1 2 1 assets/checkpoints/resharded",
}
# Run by tests of their own: the quickstart, the tests, containers, jobs, the seeds' commands with a hub.
ELSEWHERE = (
    "quickstart.sh",
    "tests/run.sh",
    "scripts/cluster/",
    "docker build",
    "scripts/checkpoints/",
    "scripts/data/",
    "….sh",
)


def commands_of_the_readme() -> list[str]:
    """Every command that begins with bash, or with variables and bash, as typed, in order."""
    text = (tiny.ROOT / "README.md").read_text().replace("\\\n", " ")
    # tests/process/test_seed_commands.py types those.
    text = re.sub(r"## From other projects' commands.*?(?=\n## )", "", text, flags=re.DOTALL)
    blocks = re.findall(r"^(?:[A-Z_]+=\S+ +)*bash \S.*$", text, flags=re.MULTILINE)
    inline = re.findall(r"`((?:[A-Z_]+=\S+ )*bash [^`]+)`", text)
    found = [re.sub(r"\s+# .*$", "", command) for command in (*blocks, *inline)]
    return [command for command in dict.fromkeys(found) if not any(part in command for part in ELSEWHERE)]


@pytest.mark.timeout(900)
def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    root = copied_repository(tmp_path / "clone")
    tiny.run_module("quickstart", "model", tmp_path / "source")
    files = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir() if path.is_file()}
    rows = (tiny.ROOT / "assets/quickstart/train.json").read_bytes().splitlines(keepends=True)
    repositories = {
        "models/deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": HubRepository(files),
        "datasets/Vinnnf/Hybrid-OpenThoughts2-1M-1.5B": HubRepository({"train.jsonl": b"".join(rows[:200])}),
    }
    typed = commands_of_the_readme()
    assert len(typed) >= 13
    small = {"SEQ_LENGTH": 256, "GLOBAL_BATCH_SIZE": 4, "PRECISION": "fp32", "TRAIN_ITERS": 3, "EVAL_ITERS": 1}
    small |= {"VERIFY": 0, "MAX_NEW_TOKENS": 8, "LIMIT": 8, "HF_HOME": str(tmp_path / "hf")}
    with Hub(repositories) as server:
        for command in typed:
            run = command
            for old, new in REPLACED.items():
                run = run.replace(old, new)
            # The path of the run says its steps, of which there are fewer here.
            more = {"OUTPUT_PATH": root / "outputs/checkpoints" / RUN} if "/sft/" in run else {}
            shell(run, root, HF_ENDPOINT=server.address, **small, **more)
    assert (root / "assets/checkpoints/export/Hybrid_R1_1.5B/model.safetensors").is_file()
    assert (root / "scripts/sft/mine.sh").is_file()
