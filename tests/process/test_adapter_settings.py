"""What the settings of adapters do: dropout, scaling, LoRA+, a choice of projections, recomputation, precisions."""

from pathlib import Path

import pytest
import torch

from tests.support import tiny, tiny_families
from tests.support.adapter_case import LR, STEPS, TARGETS, Case
from tests.support.layout_worker import stored_tensors

GROUPED_WORKER = Path(__file__).parents[1] / "support" / "grouped_worker.py"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("adapters"), "qwen2", target_modules=TARGETS)


@pytest.mark.parametrize("option", ["--recompute selective", "--recompute full", "--recompute-layers 1"])
def test_recomputed_layers_over_a_frozen_embedding_have_pefts_gradients(case: Case, option: str) -> None:
    case.assert_as_peft(case.train("1x1", *option.split()))


def test_rslora_on_q_and_v_of_a_part_of_the_model_is_pefts(case: Case) -> None:
    """The fused layer has outputs without an adapter, split over KV groups, and the first and last stage do as well."""
    other = case.with_adapter("rslora", rank=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "v_proj"])
    other.assert_as_peft(other.train("TP2 x PP2", name="rslora run"))


@pytest.mark.parametrize(
    ("targets", "layout", "recompute"),
    [
        (["down_proj"], "1x1", "selective"),
        (["down_proj"], "PP2", "full"),
        (["k_proj", "o_proj", "up_proj"], "TP2 + SP", "selective"),
        (["gate_proj"], "TP2", "full"),
    ],
)
def test_a_choice_of_projections_is_pefts(case: Case, targets: list[str], layout: str, recompute: str) -> None:
    name = " ".join([*targets, layout, recompute])
    other = case.with_adapter(name, target_modules=targets)
    other.assert_as_peft(other.train(layout, "--recompute", recompute, name=f"{name} run"))


def test_lora_plus_is_adamw_with_a_group_for_b(case: Case) -> None:
    run = case.train("TP2", "--lora-plus", "4")
    case.assert_as_peft(run, plus=4.0)
    assert {line["lr"] for line in tiny.metrics(run)} == {LR}


DROPOUT = ["--lora-dropout", "0.3"]


def test_dropout_is_redrawn_alike_when_recomputing_and_when_resuming(case: Case) -> None:
    runs = {word: case.train("1x1", *DROPOUT, "--recompute", word) for word in ("none", "selective", "full")}
    assert tiny.losses(runs["none"]) == tiny.losses(runs["selective"]) == tiny.losses(runs["full"])
    assert tiny.losses(runs["none"]) != pytest.approx(case.expected().losses, rel=1e-4)
    again = tiny.as_of(2, runs["none"], case.folder / "dropout again")
    case.train("1x1", *DROPOUT, name=again.name, mode="resume")
    assert tiny.losses(again) == tiny.losses(runs["none"])
    one, other = (stored_tensors(run / f"iter_{STEPS:07d}") for run in (again, runs["none"]))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.gpu
def test_on_a_gpu_dropout_is_redrawn_alike_and_16_bits_stay_near_float32(case: Case) -> None:
    words = ("none", "selective", "full")
    runs = [case.train("1x1", *DROPOUT, "--recompute", word, name=f"GPU {word}", on_gpu=True) for word in words]
    for run in runs[1:]:
        assert tiny.losses(run) == pytest.approx(tiny.losses(runs[0]), rel=1e-5)
    for precision, tolerance in (("bf16", 2e-2), ("fp16", 3e-3)):
        half = case.train("1x1", "--precision", precision, name=f"GPU {precision}", on_gpu=True)
        assert tiny.losses(half) == pytest.approx(case.expected().losses, rel=tolerance)


def test_tensor_parallel_ranks_that_read_the_same_tokens_drop_the_same(case: Case) -> None:
    """So one process and two have the same losses, where A is whole on each."""
    other = case.with_adapter("columns", target_modules=["q_proj", "v_proj", "up_proj"])
    one, two = (other.train(layout, *DROPOUT, name=f"columns {layout}") for layout in ("1x1", "TP2"))
    assert tiny.losses(two) == pytest.approx(tiny.losses(one), rel=1e-5)


def test_validation_drops_nothing(case: Case) -> None:
    still = ["--lr", "0", "--min-lr", "0", "--split", "75,25,0", "--eval-interval", "5"]
    with_dropout, without = (case.train("DP2", *still, *more) for more in (DROPOUT, []))
    assert tiny.validation_losses(with_dropout) == tiny.validation_losses(without) != []
    assert all(a != b for a, b in zip(tiny.losses(with_dropout), tiny.losses(without), strict=True))


@pytest.mark.parametrize(
    ("precision", "optimizer", "tolerance"),
    [("bf16", "fp32", 2e-2), ("fp16", "fp32", 3e-3), ("bf16", "bf16", 2e-2), ("bf16", "8bit", 2e-2)],
)
def test_16_bits_stay_near_float32_and_their_masters_are_float32(
    case: Case, precision: str, optimizer: str, tolerance: float
) -> None:
    run = case.train("TP2", "--precision", precision, "--optimizer-precision", optimizer, "--initial-loss-scale", "1024")
    assert tiny.losses(run) == pytest.approx(case.expected().losses, rel=tolerance)
    assert [line["grad_norm"] for line in tiny.metrics(run)] == pytest.approx(case.expected().norms, rel=5 * tolerance)
    last, half = stored_tensors(run / f"iter_{STEPS:07d}"), getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[precision])
    for name, weight in case.expected().weights.items():
        master = last[f"optimizer.state.param.{name}"]
        assert master.dtype == torch.float32 and not torch.equal(master, master.to(half).float())
        assert last[name].dtype == half and torch.equal(last[name], master.to(half))
        # Adam moves a weight by at most LR a step or so, here in about the same direction.
        assert (master - weight).abs().max() <= 2.1 * STEPS * LR, name


@pytest.mark.parametrize("processes", [1, 2])
def test_a_layer_of_several_experts_is_a_layer_an_expert(tmp_path: Path, processes: int) -> None:
    """As Transformer Engine has them, with an expert that gets no token; two processes share each expert."""
    model = tiny_families.save_family(tmp_path / "model", "qwen3_moe")
    tiny.launch_test_worker(processes, GROUPED_WORKER, model / "config.json")
