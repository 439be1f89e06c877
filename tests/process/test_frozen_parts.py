"""FREEZE and TRAIN_ROUTER: what is frozen stays as it was to the last bit, the rest trains as transformers trains it."""

import json
import re
from collections.abc import Callable

import pytest
import torch

from tests.support import tiny
from tests.support.adapter_case import LR, STEPS, Case
from tests.support.layout_worker import stored_tensors

FIRST_STAGE = "embedding,layers 0-2"
LAST_STAGE = "layers 3-4,head,model.norm.weight"
# Family, layout, options, and a regular expression for transformers' names of the frozen parameters.
CASES: dict[str, tuple[str, str, list[str], str]] = {
    "the first stage": ("qwen2", "PP2", ["--freeze", FIRST_STAGE, "--clip-grad", "1.0"], r"embed_tokens|layers\.[012]\."),
    "the last stage": (
        "qwen2",
        "PP2",
        ["--freeze", "layers 3-4,head,model.norm.weight"],
        r"layers\.[34]\.|lm_head|model\.norm",
    ),
    "the first of interleaved chunks": (
        "qwen2_4_layers",
        "PP2 x VPP2",
        ["--freeze", "embedding,layers 0"],
        r"embed|layers\.0\.",
    ),
    "a tied embedding and norms": ("llama32_tied", "PP2", ["--freeze", "embedding,norms"], r"embed_tokens|norm"),
    "attention, recomputed": (
        "qwen3_tied",
        "TP2 + SP",
        ["--freeze", "attention,embedding", "--recompute", "full"],
        r"[qkvo]_proj|embed_tokens",
    ),
    "MLP by pattern, norms recomputed": (
        "qwen2",
        "TP2",
        ["--freeze", "model.layers.*.mlp,model.layers.?.self_attn.*.bias", "--recompute", "selective"],
        r"mlp|bias",
    ),
    "shared experts": ("qwen2_moe", "EP2 x TP2", ["--freeze", "shared_experts"], r"shared_expert"),
    "router with its bias": ("gpt_oss", "TP2", ["--freeze", "router,attention"], r"mlp\.router\.|[qkvo]_proj"),
    "experts": ("qwen3_moe", "EP2", ["--freeze", "experts"], r"experts\."),
    "router": ("qwen3_moe", "TP2", ["--train-router", "0"], r"mlp\.gate\."),
    "all but experts": (
        "qwen3_moe",
        "EP2 x TP2",
        ["--freeze", "embedding,head,attention,norms,router"],
        r"embed_tokens|lm_head|self_attn|norm|mlp\.gate\.",
    ),
}


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def make(family: str) -> Case:
        if family not in made:
            made[family] = Case(tmp_path_factory.mktemp(family), family)
        return made[family]

    return make


@pytest.mark.parametrize("name", CASES)
def test_frozen_weights_stay_and_the_others_train_as_in_transformers(case_of: Callable[[str], Case], name: str) -> None:
    family, layout, options, frozen = CASES[name]
    case = case_of(family)
    run = case.train(layout, *options, name=name, adapter=False)
    expected = case.expected_of(frozen, clip=1.0 if "--clip-grad" in options else 0.0)
    assert "--clip-grad" not in options or max(expected.norms) > 1.0
    assert tiny.losses(run) == pytest.approx(expected.losses, rel=1e-5)
    assert [line["grad_norm"] for line in tiny.metrics(run)] == pytest.approx(expected.norms, rel=1e-5)
    assert {line["lr"] for line in tiny.metrics(run)} == {LR}
    tiny.run_module("export", "--load", run, "--hf-dir", case.model, "--output", run / "export")
    before, after = tiny.tensors(case.model), tiny.tensors(run / "export")
    assert before.keys() == after.keys() == expected.weights.keys()
    changed = 0
    for key, weight in after.items():
        assert isinstance(weight, torch.Tensor) and isinstance(before[key], torch.Tensor)
        if re.search(frozen, key):
            assert torch.equal(weight, before[key]), key
        else:
            difference = (weight - expected.weights[key]).abs().max()
            assert difference <= 1e-5, (key, difference)
            changed += not torch.equal(weight, before[key])
    assert changed == sum(not re.search(frozen, key) for key in after)


@pytest.mark.parametrize(
    ("frozen", "precision", "optimizer"),
    [(FIRST_STAGE, "bf16", "bf16"), (FIRST_STAGE, "bf16", "8bit"), (FIRST_STAGE, "fp16", "fp32"), (LAST_STAGE, "fp16", "fp32")],
)
def test_a_stage_without_trained_weights_resumes_bit_for_bit_in_16_bits(
    case_of: Callable[[str], Case], frozen: str, precision: str, optimizer: str
) -> None:
    """Such a stage has no optimizer, and still takes part in the norm of all gradients; the first one writes the manifest."""
    case = case_of("qwen2")
    options = ["--freeze", frozen, "--precision", precision, "--optimizer-precision", optimizer, "--clip-grad", "1"]
    whole = case.train("PP2", *options, name=f"{precision} {optimizer} {frozen}", adapter=False)
    again = tiny.as_of(2, whole, case.folder / f"again {precision} {optimizer} {frozen}")
    case.train("PP2", *options, name=again.name, mode="resume", adapter=False)
    assert tiny.losses(again) == tiny.losses(whole)
    one, other = (stored_tensors(run / f"iter_{STEPS:07d}") for run in (again, whole))
    assert all(torch.equal(one[name].nan_to_num(nan=9.0), other[name].nan_to_num(nan=9.0)) for name in other)
    records = [json.loads((run / f"iter_{STEPS:07d}" / "manifest.json").read_text())["training"] for run in (again, whole)]
    assert records[0]["optimizer"] == records[1]["optimizer"] and records[0]["optimizer"]["step"] > 0


def test_a_run_with_frozen_weights_resumes_bit_for_bit_and_not_with_others(case_of: Callable[[str], Case]) -> None:
    """The first pipeline stage holds no trained weight, so that it has no optimizer state."""
    case = case_of("qwen2")
    options = ["--freeze", FIRST_STAGE]
    whole = case.train("PP2", *options, name="whole", adapter=False)
    again = tiny.as_of(2, whole, case.folder / "again")
    case.train("PP2", *options, name="again", mode="resume", adapter=False)
    assert tiny.losses(again)[-3:] == tiny.losses(whole)[-3:]
    one = tiny.as_of(2, whole, case.folder / "again in one process")
    case.train("1x1", *options, name=one.name, mode="resume", adapter=False)
    assert tiny.losses(one)[-3:] == pytest.approx(tiny.losses(whole)[-3:], rel=1e-6)
    arguments = ["--load", case.folder / "mcore", "--data-path", case.data, "--save", again, "--train-iters", "9"]
    for freeze, named in (("layers 0-2", "embedding.word_embeddings.weight"), ("", "decoder.layers.0.mlp.linear_fc1")):
        output = tiny.run_module("train", "resume", *arguments, "--freeze", freeze, status=2)
        assert f"error: {named}" in output and "(FREEZE, TRAIN_ROUTER) was frozen in" in output and "is trained now" in output
