"""`plan`: its report on every recipe before anything is downloaded, and that it finds everything that would stop a run."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.fork_server import SERVER

# Of this project, without those that a user has added.
_listed = subprocess.run(["git", "-C", tiny.ROOT, "ls-files", "scripts"], capture_output=True, text=True).stdout.split()
_there = [path for folder in ("sft", "dpo") for path in sorted((tiny.ROOT / "scripts" / folder).glob("*.sh"))]
RECIPES = {path.stem: path for path in _there if not _listed or str(path.relative_to(tiny.ROOT)) in _listed}
HYBRID = "SFT_Hybrid_R1_{}_OpenThoughts_1M"
HYBRID_SIZES = ("1.5B", "7B", "14B", "32B", "Llama_8B")
QWEN_SIZES = ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")
# (recipe, MODEL_SIZE, recipe whose head says what that size fits)
CASES = [(HYBRID.format(size), size, HYBRID.format("1.5B")) for size in HYBRID_SIZES]
# The recipes of any size, and the size that their heads' commands are about.
OF_ANY_SIZE = {"SFT_Qwen2.5": "1.5B", "SFT_LoRA": "7B", "DPO_Qwen2.5": "3B"}
CASES += [(name, size, name) for name in OF_ANY_SIZE for size in QWEN_SIZES]
CASES += [(name, "", name) for name in RECIPES if name not in {"SFT_Quickstart", *(case[0] for case in CASES)}]


def plan(recipe: Path, *words: str, **variables: object) -> tuple[int, str]:
    """(status, output with every line whole) of `bash RECIPE plan`."""
    ours = {name: value for name, value in os.environ.items() if name.isupper()}
    environment = {**ours, **SERVER.python(), "MEGATRON_SFT_DEVICE": "cpu"}
    result = subprocess.run(
        ["bash", str(recipe), "plan", *words],
        env={**environment, **{name: str(value) for name, value in variables.items()}},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
    )
    assert "Traceback" not in result.stdout, result.stdout
    return result.returncode, re.sub(r"\n {6,}", " ", result.stdout)


def line(output: str, name: str) -> str:
    found = re.search(rf"^  {name} +(.*)$", output, flags=re.MULTILINE)
    assert found, f"no line {name!r} in:\n{output}"
    return found[1]


@pytest.mark.parametrize(("recipe", "size", "promising"), CASES)
def test_a_recipe_is_planned_before_its_model_and_data_are_there(
    recipe: str, size: str, promising: str, tmp_path: Path
) -> None:
    path = RECIPES[recipe]
    variables = {"MODEL_SIZE": size} if size else {}
    status, output = plan(path, ASSETS_DIR=tmp_path, OUTPUT_PATH=tmp_path / "run", **variables)
    assert status == 2
    assert re.search(r"1\. PRETRAIN_CHECKPOINT_PATH .* does not exist: make it with scripts/2_convert.sh", output)
    assert re.search(r"2\. DATA_PATH .* does not exist: make it with scripts/3_tokenize.sh", output)
    first = output.partition("do first:")[2]
    assert "bash scripts/1_download.sh model " in first
    # The commands come from the recipe's head, where that is about this size's model.
    assert ("bash scripts/3_tokenize.sh assets/" in first) == (OF_ANY_SIZE.get(recipe, size) == size)
    assert re.match(
        r"\d+\.\d GiB .*RECOMPUTE(=(none|selective|full)|_LAYERS=\d+)\b.*: weights \d", line(output, "memory of a GPU")
    )
    # A recipe's head promises what plan prints, of each size that it names.
    head = RECIPES[promising].read_text().partition("#SBATCH")[0]
    promised = f"# Fits with {size} (memory by plan): " if size else "# Fits (memory by plan): "
    assert f"{promised}{line(output, 'fits')}\n" in head


def test_the_recipe_of_a_mixture_promises_what_plan_says_of_two_nodes(tmp_path: Path) -> None:
    path = RECIPES["SFT_Qwen3_30B_A3B"]
    _, output = plan(path, ASSETS_DIR=tmp_path, OUTPUT_PATH=tmp_path / "run", NNODES=2)
    assert line(output, "processes").startswith("16 = ") and "OPTIMIZER_PRECISION=fp32" in line(output, "recipe")
    promised = f"# Fits with NNODES=2 (memory by plan): {line(output, 'fits')}\n"
    assert promised in path.read_text()
    # No fewer than hold all experts once.
    assert all(int(count) >= 8 for count in re.findall(r": (\d+) GPU", promised))


@pytest.fixture
def recipe(converted: Path, packed_rows: Path, tmp_path: Path) -> Path:
    """A recipe of the tiny model and data."""
    path = tmp_path / "my recipe.sh"
    path.write_text(
        f'TRAIN_ITERS=10\n: "${{LR:=1e-3}}"\nMIN_LR=1e-4\nPRETRAIN_CHECKPOINT_PATH="{converted}"\nDATA_PATH="{packed_rows}"\n'
        f'OUTPUT_PATH="{tmp_path}/a run"\n: "${{GLOBAL_BATCH_SIZE:=8}}"\nsource "{tiny.ROOT}/scripts/4_train.sh"\n'
    )
    return path


def test_a_run_that_can_start_is_planned_with_where_each_value_came_from(recipe: Path) -> None:
    status, output = plan(recipe, LR="2e-3", TOKENS_PER_SECOND=1000)
    assert status == 0, output
    assert "LR=0.002" in line(output, "environment") and "TOKENS_PER_SECOND=1000.0" in line(output, "environment")
    assert "MIN_LR=0.0001" in line(output, "recipe") and "TRAIN_ITERS=10 " in line(output, "recipe")
    assert "WEIGHT_DECAY=0.1" in line(output, "defaults") and "ON_NAN" not in output
    assert "ON_NAN=stop" in line(plan(recipe, "all")[1], "defaults")
    assert line(output, "steps") == "10 (TRAIN_ITERS, 1.25 epochs), of them 0 of warm-up"
    manifest = json.loads(Path(re.search(r"DATA_PATH=(\S+)", output)[1] + ".json").read_text())  # type: ignore[index]
    seconds = 80 / 64 * manifest["tokens"] / 1000
    assert line(output, "time").startswith(f"0m{int(seconds):02d}s for ")


def test_the_time_is_taken_from_an_earlier_part_of_the_run(recipe: Path) -> None:
    run = recipe.parent / "a run"
    run.mkdir()
    speeds = [{"iteration": n, "tokens_per_second": speed} for n, speed in enumerate((10.0, 2000.0, 2100.0))]
    lines = [json.dumps(each) for each in [*speeds, {"iteration": 3, "validation_loss": 1.0}]]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"iteration": 4, "tok')
    status, output = plan(recipe)
    assert status == 0 and "at 2,000 tokens/s (the median of " in line(output, "time")


def test_every_problem_is_listed_not_only_the_first(recipe: Path, packed_rows: Path, tmp_path: Path) -> None:
    shutil.copy(packed_rows.with_name(packed_rows.name + ".bin"), tmp_path / "cut.bin")
    for ending in ("idx", "json"):
        shutil.copy(packed_rows.with_name(f"{packed_rows.name}.{ending}"), tmp_path / f"cut.{ending}")
    with open(tmp_path / "cut.bin", "r+b") as file:
        file.truncate(100)
    text = recipe.read_text().replace(f'DATA_PATH="{packed_rows}"', f'DATA_PATH="{tmp_path}/cut"')
    recipe.write_text(text)
    status, output = plan(
        recipe, LR="1e-5", TENSOR_PARALLEL_SIZE=3, GLOBAL_BATCH_SIZE=7, MICRO_BATCH_SIZE=2, GPU_MEMORY_GIB=0.5,
        LOG_INTERVAL=0, SEQ_LENGTH=128,
    )  # fmt: skip
    problems = output.partition("this run cannot start:")[2]
    assert status == 2
    for expected in (
        "LOG_INTERVAL is 0",
        "MIN_LR=0.0001 must lie between 0 and LR=1e-05",
        "TP=3 does not divide the model's 4 attention heads and 2 KV heads: choose TP from 1, 2",
        "cut.bin has 100 bytes, its manifest says ",
        "GLOBAL_BATCH_SIZE=7 is not a multiple of MICRO_BATCH_SIZE=2 x 1 data-parallel copies: take 8",
        "a GPU needs about ",
    ):
        assert expected in problems, output


def test_the_gpu_that_a_run_does_not_fit_is_named(recipe: Path) -> None:
    status, output = plan(recipe, GPU_MEMORY_GIB=1)
    assert status == 2 and "has 1.0 (GPU_MEMORY_GIB): no change of one or two settings fits" in output
    status, output = plan(recipe, GPU_MEMORY_GIB=24, OPTIMIZER_OFFLOAD=0.5)
    assert line(output, "CPU memory") == "0.0 GB of all processes together for 50% of the optimizer's state"
    assert line(output, "memory by phase").endswith(" decides")
    assert status == 0 and line(output, "GPU") == "24.0 GiB, GPU_MEMORY_GIB"


def test_checkpoints_that_the_disk_cannot_hold_are_a_problem(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("TRAIN_ITERS=10", "TRAIN_ITERS=1000000000"))
    status, output = plan(recipe, SAVE_INTERVALS=1)
    assert status == 2 and re.search(
        r"1000000000 checkpoints of 1\.\d MB do not fit the .* GB free in .*: save less often", output
    )


def test_planning_writes_nothing_and_a_converted_model_next_to_it_is_pointed_to(recipe: Path, converted: Path) -> None:
    before = sorted(recipe.parent.rglob("*"))
    recipe.write_text(recipe.read_text().replace(str(converted), str(converted).replace("TP1PP1", "TP2PP1")))
    status, output = plan(recipe)
    assert status == 2 and f"PRETRAIN_CHECKPOINT_PATH={converted}, which is there" in output
    assert sorted(recipe.parent.rglob("*")) == before
