"""LoRA at every layout equals PEFT's: losses, gradients of both factors, weights after five steps of AdamW.

Every layout of every family: pytest -m campaign tests/process/test_adapters.py
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.adapter_case import LAYOUTS, TARGETS, Case

EVERYWHERE = ["1x1", "TP2", "TP2 + SP", "PP2", "CP2", "DP2", "TP2 x PP2", "TP2 + SP x CP2"]
# With experts megatron-core needs sequence parallelism under TP, which it then has by itself.
WITH_EXPERTS = ["1x1", "TP2", "PP2", "CP2", "DP2", "TP2 x PP2", "EP2", "EP2 x TP2", "EP2 x TP2 x DP2", "EP2 x PP2"]
# One tensor for several projections: a rank's rows of it do not lie together.
PHI3 = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
QWEN35 = [*TARGETS, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]
WITHOUT_CP = [layout for layout in EVERYWHERE if "CP" not in layout]
# Some that every tensor-parallel rank holds whole.
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
MIXTRAL = ["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"]
# CI's runs of experts recompute whole layers; dense models do in test_adapter_settings.py.
OPTIONS = {"qwen3_moe": ["--recompute", "full"]}
# The configuration of the adapter; the layouts that CI takes, one or two that no other family has; all that there are.
FAMILIES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "qwen2": ({}, ["1x1", "TP2 x PP2", "CP2"], EVERYWHERE),
    "qwen2_tied_bf16": ({}, ["TP2"], EVERYWHERE),
    "qwen2_4_layers": ({}, ["PP2 x VPP2"], ["PP2 x VPP2", "PP2"]),
    "llama2_bf16": ({}, ["DP2"], EVERYWHERE),
    "llama3": ({}, [], EVERYWHERE),
    "llama32_tied": ({}, ["PP2"], EVERYWHERE),
    "qwen3_tied": ({}, ["TP2 + SP"], EVERYWHERE),
    "qwen3_bf16": ({}, [], EVERYWHERE),
    "mistral_window": ({}, ["TP2 + SP x CP2"], EVERYWHERE),
    "phi3": ({"target_modules": PHI3}, ["TP2 x PP2"], EVERYWHERE),
    "qwen3_5": ({"target_modules": QWEN35}, ["TP2 + SP"], WITHOUT_CP),
    "glm4": ({"target_modules": [*TARGETS[:4], *PHI3[2:]]}, [], EVERYWHERE),
    "olmo2": ({}, [], EVERYWHERE),
    "gemma3": ({}, [], EVERYWHERE),
    "granite": ({}, [], EVERYWHERE),
    "deepseek_v2_moe": ({"target_modules": ["q_proj", *LATENT[2:]]}, [], EVERYWHERE),
    "deepseek_v3_moe": ({"target_modules": LATENT}, ["TP2 + SP", "TP2 x PP2"], EVERYWHERE),
    "qwen3_moe": ({"elsewhere": True}, ["TP2", "EP2 x TP2"], WITH_EXPERTS),
    "mixtral": ({"elsewhere": True, "target_modules": MIXTRAL}, ["EP2"], WITH_EXPERTS),
}


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def make(family: str) -> Case:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = Case(folder, family, **{"target_modules": TARGETS, **FAMILIES[family][0]})
        return made[family]

    return make


@pytest.mark.parametrize(("family", "layout"), [(family, each) for family, (_, ours, _) in FAMILIES.items() for each in ours])
def test_adapters_train_as_in_peft(case_of: Callable[[str], Case], family: str, layout: str) -> None:
    case = case_of(family)
    case.assert_as_peft(case.train(layout, *OPTIONS.get(family, [])))


@pytest.mark.campaign
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_train_as_in_peft_in_every_layout(case_of: Callable[[str], Case], family: str) -> None:
    case = case_of(family)
    for layout in FAMILIES[family][2]:
        case.assert_as_peft(case.train(layout, name=f"{layout} of all"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "layout"), [*(("qwen2", each) for each in EVERYWHERE), *(("qwen3_moe", each) for each in WITH_EXPERTS)]
)
def test_adapters_train_as_in_peft_on_gpus(case_of: Callable[[str], Case], family: str, layout: str) -> None:
    """With Transformer Engine, where it is installed, the experts of a process are one layer."""
    if torch.cuda.device_count() < LAYOUTS[layout][0]:
        pytest.skip(f"{LAYOUTS[layout][0]} GPUs are needed")
    case = case_of(family)
    case.assert_as_peft(case.train(layout, name=f"{layout} on GPUs", on_gpu=True))


def test_every_layout_is_taken_by_some_family() -> None:
    assert {layout for _, ours, _ in FAMILIES.values() for layout in ours} >= LAYOUTS.keys() - {"EP2 x PP2", "EP2 x TP2 x DP2"}
