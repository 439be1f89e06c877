"""The estimate of a GPU's memory: counts against real models, totals against peaks measured on a GPU."""

from dataclasses import replace

import pytest

from megatron.sft.families.lora import LoRA, chosen_targets
from megatron.sft.families.trained import Trained
from megatron.sft.hf.published_configs import find_architecture, published_configs
from megatron.sft.model.layout import Layout
from megatron.sft.planning.layouts import suggest_layouts
from megatron.sft.planning.memory import GIB, MemorySettings, estimate, layer_tensors, num_parameters

ONE = Layout()
# A row of 16,384 tokens of the 1.5B model on one GPU, 4 micro-batches a step.
R1_1_5B, ROW = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", MemorySettings(16384, num_micro_batches=4)


@pytest.mark.parametrize(
    ("model", "published"),
    [
        (R1_1_5B, 1_777_088_000),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 8_030_261_248),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("Qwen/Qwen2-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-14B-Instruct", 14_770_033_664),
        ("Qwen/Qwen2.5-72B-Instruct", 72_706_203_648),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("google/gemma-3-1b-it", 999_885_952),
        ("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552),
        ("microsoft/phi-4", 14_659_507_200),
        ("HuggingFaceTB/SmolLM3-3B", 3_075_098_624),
        ("ByteDance-Seed/Seed-OSS-36B-Instruct", 36_151_104_512),
        ("allenai/OLMo-2-1124-7B-Instruct", 7_298_617_344),
        ("THUDM/GLM-4-9B-0414", 9_400_279_040),
        ("baidu/ERNIE-4.5-0.3B-PT", 360_748_032),
        ("deepseek-ai/DeepSeek-V2-Lite", 15_706_484_224),
        ("deepseek-ai/DeepSeek-V3", 671_026_404_352),
    ],
)
def test_the_number_of_parameters_is_the_published_one(model: str, published: int) -> None:
    assert num_parameters(find_architecture(model)[0]) == published


def test_every_model_of_the_table_can_be_read() -> None:
    for model in published_configs():
        assert estimate(find_architecture(model)[0], Layout(), 1, ROW).total > 0


@pytest.mark.parametrize(
    ("layout", "copies", "changes", "measured_gib"),
    [
        # torch.cuda.max_memory_allocated of tools/benchmark_train, docs/performance.md
        (ONE, 1, {}, 62.2),
        (ONE, 1, {"recompute": "selective"}, 52.0),
        (ONE, 1, {"recompute": "full"}, 33.0),
        (ONE, 1, {"optimizer_precision": "bf16"}, 49.0),
        (ONE, 1, {"optimizer_precision": "bf16", "recompute": "selective"}, 38.7),
        (ONE, 1, {"optimizer_offload": 1.0}, 42.4),
        (ONE, 1, {"precision": "fp8"}, 59.5),
        (ONE, 1, {"seq_length": 8192}, 46.5),
        (ONE, 1, {"seq_length": 32768, "recompute": "selective"}, 73.7),
        (ONE, 2, {}, 52.3),
        (Layout(2, sequence_parallel=True), 1, {}, 31.3),
        (Layout(1, 2), 1, {}, 47.1),
        (Layout(1, 1, 2), 1, {}, 36.6),
        (Layout(2, 2, sequence_parallel=True), 1, {}, 23.6),
    ],
)
def test_the_estimate_is_within_10_percent_of_peaks_measured_on_an_h200(
    layout: Layout, copies: int, changes: dict[str, object], measured_gib: float
) -> None:
    architecture, _ = find_architecture(R1_1_5B)
    estimated = estimate(architecture, layout, copies, replace(ROW, **changes)).tensors / GIB  # type: ignore[arg-type]
    assert abs(estimated / measured_gib - 1) <= 0.10


@pytest.mark.parametrize(
    ("model", "changes", "measured_gib"),
    [
        # one H100, docs/performance.md
        ("7B", {"recompute": "selective"}, 62.6),
        ("7B", {"recompute": "full"}, 21.7),
        ("7B", {"recompute": "selective", "precision": "fp8"}, 74.7),
        ("7B", {"recompute": "full", "seq_length": 4096}, 16.7),
        ("7B", {"recompute": "selective", "seq_length": 4096}, 27.4),
        ("32B", {"recompute": "full", "seq_length": 4096}, 67.2),
    ],
)
def test_the_estimate_of_adapters_is_within_5_percent_of_the_peak(
    model: str, changes: dict[str, object], measured_gib: float
) -> None:
    architecture, _ = find_architecture(f"Qwen/Qwen2.5-{model}-Instruct")
    lora = LoRA(16, 32.0, *chosen_targets(architecture, "all"))
    settings = replace(MemorySettings(16384, num_micro_batches=2, trained=Trained(lora)), **changes)  # type: ignore[arg-type]
    assert abs(estimate(architecture, ONE, 1, settings).tensors / GIB / measured_gib - 1) <= 0.05


@pytest.mark.parametrize(
    ("changes", "measured_gib"),
    [
        # Four layers of Qwen3-30B-A3B on one H100, docs/performance.md
        ({"recompute": "selective"}, 58.1),
        ({}, 60.4),
        ({"recompute": "selective", "optimizer_precision": "bf16"}, 34.9),
    ],
)
def test_the_estimate_of_a_mixture_is_within_5_percent_of_the_peak(changes: dict[str, object], measured_gib: float) -> None:
    whole, _ = find_architecture("Qwen/Qwen3-30B-A3B")
    architecture = replace(whole, num_layers=4, layers=whole.layers[:4])
    assert abs(estimate(architecture, ONE, 1, replace(ROW, **changes)).tensors / GIB / measured_gib - 1) <= 0.05  # type: ignore[arg-type]


@pytest.mark.parametrize(("layout", "share"), [(ONE, 1), (Layout(expert_parallel=4), 4)])
def test_fp8_keeps_the_experts_weights_twice_more_in_8_bits_and_their_rows_in_16(layout: Layout, share: int) -> None:
    architecture, _ = find_architecture("Qwen/Qwen3-30B-A3B")
    bf16, fp8 = (estimate(architecture, layout, 4, replace(ROW, precision=word, recompute="none")) for word in ("bf16", "fp8"))
    # Layers, experts, three matrices of 2,048 x 768 each, a byte each, as rows and as columns; attention's projections.
    experts, attention = 48 * 128 * 3 * 2048 * 768 * 2, 48 * 2048 * 128 * (2 * 32 + 2 * 4) * 2
    assert fp8.weights - bf16.weights == experts // share + attention
    kept = [
        layer_tensors(architecture, layout, replace(ROW, precision=word), architecture.layers[0]) for word in ("bf16", "fp8")
    ]
    changed = {name for name in kept[0] if kept[0][name] != kept[1][name]}
    assert changed == {"attention norm"}


@pytest.mark.parametrize(("optimizer_precision", "measured_gib"), [("bf16", 38.3), ("fp32", 61.1)])
def test_the_estimate_of_a_larger_model_is_within_5_percent_of_the_peak_on_an_h100(
    optimizer_precision: str, measured_gib: float
) -> None:
    architecture, _ = find_architecture("Qwen/Qwen2.5-3B-Instruct")
    settings = MemorySettings(4096, num_micro_batches=4, recompute="selective", optimizer_precision=optimizer_precision)
    assert abs(estimate(architecture, Layout(), 1, settings).tensors / GIB / measured_gib - 1) <= 0.05


def test_the_first_stage_of_a_pipeline_keeps_a_micro_batch_for_every_stage() -> None:
    architecture, _ = find_architecture("Qwen/Qwen2.5-7B-Instruct")
    few, many = (estimate(architecture, Layout(1, 4), 1, replace(ROW, num_micro_batches=count)).activations for count in (1, 8))
    assert 3.5 < many / few <= 4.0


def test_data_parallel_copies_share_the_optimizer_and_offloading_empties_it() -> None:
    architecture, _ = find_architecture(R1_1_5B)
    one, four = (estimate(architecture, Layout(), copies, ROW) for copies in (1, 4))
    assert one.optimizer == 12 * num_parameters(architecture) and four.optimizer == one.optimizer // 4
    assert (one.weights, one.gradients) == (four.weights, four.gradients)
    assert estimate(architecture, Layout(), 1, replace(ROW, optimizer_offload=1.0)).optimizer == 0


def test_suggested_layouts_fit_divide_the_gpus_and_the_fastest_comes_first() -> None:
    architecture, _ = find_architecture("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
    found = suggest_layouts(architecture, 8, 80 * GIB, MemorySettings(16384), 128)
    assert found and all(suggestion.memory.total <= 80 * GIB for suggestion in found)
    assert all(suggestion.layout.model_size * suggestion.data_parallel == 8 for suggestion in found)
    assert all(architecture.num_kv_heads % suggestion.layout.tensor_parallel == 0 for suggestion in found)
    times = [suggestion.time.total for suggestion in found]
    assert times == sorted(times)
