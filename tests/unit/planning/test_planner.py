"""What `plan` says of shapes and layouts that no recipe has: it answers soon, its parts add up, its advice can be followed."""

import re
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from megatron.sft import suggest
from megatron.sft.hf.names import model_folder_name
from megatron.sft.planning.options import TrainOptions, variable_of
from megatron.sft.planning.planner import add_needs
from megatron.sft.planning.resolution import Resolution, resolve
from megatron.sft.runtime.errors import UserError

VARIABLES = {variable_of(setting): setting.name for setting in fields(TrainOptions)}


def planned(model: str, num_processes: int, **settings: Any) -> Resolution:
    nowhere = Path("/nowhere")
    load = nowhere / f"{model_folder_name(model)}_Megatron_TP1PP1"
    options = TrainOptions(load, nowhere / "rows", nowhere / "run", seq_length=4096, train_iters=10)
    return of_options(replace(options, **settings), num_processes)


def of_options(options: TrainOptions, num_processes: int) -> Resolution:
    found = resolve("", options, num_processes)
    add_needs(found)
    return found


def problems(found: Resolution) -> list[str]:
    """Without those of files that are not there and of this machine's disk."""
    return [each for each in found.problems if not re.search("does not exist|make room", each)]


@pytest.mark.parametrize(
    ("model", "processes", "settings", "named"),
    [
        # Stages of 9, 8, 8 and 9 layers, which two chunks do not share evenly.
        ("google/gemma-3-4b-it", 4, {"pipeline_parallel": 4, "virtual_pipeline": 2}, "VIRTUAL_PIPELINE_SIZE"),
        ("Qwen/Qwen2.5-0.5B-Instruct", 32, {"pipeline_parallel": 32, "recompute": "auto"}, "PP=32"),
        *(
            ("Qwen/Qwen2.5-0.5B-Instruct", 1, {name: size}, f"{shown}={size} is not possible: parallel sizes start at 1")
            for name, shown in (
                *(("tensor_parallel", "TP"), ("pipeline_parallel", "PP"), ("context_parallel", "CP")),
                *(("expert_parallel", "EP"), ("virtual_pipeline", "VIRTUAL_PIPELINE_SIZE")),
            )
            for size in (0, -1)
        ),
        ("Qwen/Qwen3-30B-A3B", 3, {"expert_parallel": 3, "global_batch_size": 3}, "EP=3"),
    ],
)
def test_a_layout_that_the_model_cannot_have_is_named(model: str, processes: int, settings: dict[str, Any], named: str) -> None:
    found = planned(model, processes, **settings)
    assert named in problems(found)[0] and not any("2_convert" in each for each in found.to_do)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"precision": "fp16", "optimizer_precision": "8bit"}, "OPTIMIZER_PRECISION=8bit needs PRECISION=bf16 or fp8"),
        ({"optimizer_precision": "bf16", "optimizer_offload": 0.5}, "OPTIMIZER_OFFLOAD=0.5 needs OPTIMIZER_PRECISION=fp32"),
        ({"adam_beta1": 1.0}, "ADAM_BETA1 is 1.0"),
        ({"adam_beta2": float("nan")}, "ADAM_BETA2 is nan"),
        ({"adam_eps": 0.0}, "ADAM_EPS is 0.0"),
        ({"weight_decay": -0.1}, "WEIGHT_DECAY is -0.1"),
        ({"clip_grad": -1.0}, "CLIP_GRAD is -1.0"),
        ({"initial_loss_scale": 0.0}, "INITIAL_LOSS_SCALE is 0.0"),
        ({"recompute_layers": -1}, "RECOMPUTE_LAYERS is -1"),
        ({"recompute_layers": 25}, "RECOMPUTE_LAYERS=25 is more than the 24 layers"),
    ],
)
def test_what_the_optimizer_and_recomputation_cannot_do_is_found_before_the_run(settings: dict[str, Any], named: str) -> None:
    (problem,) = problems(planned("Qwen/Qwen2.5-0.5B-Instruct", 1, **settings))
    assert problem.startswith(named)


def test_a_wrong_word_for_recomputation_leaves_what_is_to_be_done_first() -> None:
    found = planned("Qwen/Qwen2.5-0.5B-Instruct", 1, recompute="full", recompute_layers=3)
    assert any("2_convert" in each for each in found.to_do) and "memory of a GPU" in dict(found.lines)


def test_frozen_layers_of_many_experts_are_found_in_seconds() -> None:
    begun = time.process_time()
    found = planned("Qwen/Qwen3-Next-80B-A3B-Instruct", 16, expert_parallel=16, freeze="layers 0-3")
    assert "frozen weights" in dict(found.lines)["trained"]
    assert time.process_time() - begun < 20  # half a minute for each check of a name among all others


@pytest.mark.parametrize(
    ("decides", "settings"),
    [
        ("resuming", {"optimizer_precision": "8bit", "recompute": "full", "seq_length": 1024}),
        ("forward and backward", {"precision": "fp8"}),
        ("first step", {"optimizer_offload": 1.0}),  # as much as later ones
    ],
)
def test_parts_add_up_to_what_a_gpu_needs(decides: str, settings: dict[str, Any]) -> None:
    lines = dict(planned("Qwen/Qwen2.5-7B-Instruct", 1, **settings).lines)
    total, parts = lines["memory of a GPU"].split(" GiB", 1)[0], lines["memory of a GPU"].partition(": ")[2]
    sizes = [float(each) for each in re.findall(r"(\d+\.\d)(?:,|$)", parts)]
    assert sum(sizes) == pytest.approx(float(total), abs=0.3)
    assert f"{decides} decides" in lines["memory by phase"]
    assert ("copies in float32" in parts) == (decides == "resuming")


@pytest.mark.parametrize(
    ("model", "processes", "settings"),
    [
        pytest.param(
            "Qwen/Qwen2.5-72B-Instruct",
            2,
            {"tensor_parallel": 2, "optimizer_precision": "bf16", "freeze": "layers 0-3", "gpu_memory_gib": 89.0},
            id="the same setting twice",
        ),
        pytest.param("Qwen/Qwen2.5-7B-Instruct", 1, {"recompute": "full"}, id="all layers already"),
        pytest.param(
            "Qwen/Qwen3-30B-A3B", 8, {"expert_parallel": 8, "recompute": "auto", "gpu_memory_gib": 59.0}, id="auto, experts"
        ),
        pytest.param("google/gemma-3-27b-it", 8, {"pipeline_parallel": 4, "seq_length": 8192}, id="stages"),
        pytest.param("THUDM/GLM-4-9B-0414", 2, {"seq_length": 16384, "precision": "fp16"}, id="fp16"),
    ],
)
def test_the_advice_can_be_followed_and_fits(model: str, processes: int, settings: dict[str, Any]) -> None:
    found = planned(model, processes, **{"gpu_memory_gib": 79.1, "global_batch_size": 64, "seq_length": 1024, **settings})
    (problem,) = problems(found)
    advice = re.sub(r" \([^)]*\)", "", problem.rpartition("the cheapest change that fits is ")[2])
    assert advice, problem
    for change in re.split("; else |, or ", advice):
        after = of_options(*after_change(found.options, processes, change))
        assert not problems(after), (change, problems(after))


def test_the_fewest_gpus_that_fit_are_as_many_as_the_rows_of_a_step_allow() -> None:
    for settings in ({"global_batch_size": 6}, {"global_batch_size": 8, "pipeline_parallel": 2, "virtual_pipeline": 2}):
        numbers = re.findall(r"(\d+) GPU", dict(planned("Qwen/Qwen2.5-7B-Instruct", 2, **settings).lines)["fits"])
        assert numbers
        for number in map(int, numbers):
            assert not problems(planned("Qwen/Qwen2.5-7B-Instruct", number, **settings))


def after_change(options: TrainOptions, num_processes: int, change: str) -> tuple[TrainOptions, int]:
    """As a user does what `change` says, who sets a variable once."""
    if gpus := re.search(r"(on )?(\d+) GPUs", change):
        num_processes = int(gpus[2])
    if rows := re.search(r"rows of (\d+) tokens", change):
        options = replace(options, seq_length=int(rows[1]))
    words = dict(re.findall(r"([A-Z_]+)=(\S+)", change))
    assert len(words) == change.count("="), change
    kinds = {setting.name: type(getattr(options, setting.name)) for setting in fields(TrainOptions)}
    values = {VARIABLES[variable]: value for variable, value in words.items()}
    return replace(options, **{name: kinds[name](value) for name, value in values.items()}), num_processes


@pytest.mark.parametrize(
    ("words", "named", "unnamed"),
    [
        ("--optimizer-offload 2", "'2' is not a share from 0 to 1", ""),
        ("--optimizer-offload 1 --optimizer-precision 8bit", "OPTIMIZER_OFFLOAD=1 needs OPTIMIZER_PRECISION=fp32", ""),
        ("--optimizer-offload 1 --lora-rank 8", "OPTIMIZER_OFFLOAD with LORA_RANK", ""),
        ("--precision fp16 --gpu-memory 39", "take --gpus 2", "--optimizer-precision"),
        ("--optimizer-precision bf16 --gpu-memory 32", "--optimizer-precision 8bit", "--optimizer-offload"),
    ],
)
def test_tools_plan_suggests_only_optimizers_that_a_run_takes(words: str, named: str, unnamed: str) -> None:
    with pytest.raises(UserError) as error:
        suggest.main(["Qwen/Qwen2.5-3B-Instruct", "--gpus", "1", "--row-length", "1024", *words.split()])
    assert named in str(error.value) and not (unnamed and unnamed in str(error.value)), error.value


def test_short_rows_of_a_small_model_wait_for_the_processor_and_more_of_them_at_once_do_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def waiting(model: str, **settings: Any) -> str:
        return dict(planned(model, 1, **settings).lines).get("waiting", "")

    monkeypatch.delenv("MEGATRON_SFT_DEVICE", raising=False)
    few, more = (waiting("Qwen/Qwen2.5-0.5B-Instruct", micro_batch_size=rows, global_batch_size=8) for rows in (1, 2))
    assert "MICRO_BATCH_SIZE=2" in few and "MICRO_BATCH_SIZE=4" in more
    assert int(re.search(r"(\d+)%", few)[1]) > int(re.search(r"(\d+)%", more)[1])  # type: ignore[index]
    # A micro-batch is all of the step already, and rows are long enough.
    assert "SEQ_LENGTH" in (one := waiting("Qwen/Qwen2.5-0.5B-Instruct", global_batch_size=1)) and "MICRO_BATCH_SIZE" not in one
    assert not waiting("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", seq_length=16384)
    monkeypatch.setenv("MEGATRON_SFT_DEVICE", "cpu")
    assert not waiting("Qwen/Qwen2.5-0.5B-Instruct")
