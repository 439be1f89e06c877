"""The benchmark of memory, whole, on the CPU with a tiny model: what a GPU then measures at full size."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import memory
from benchmarks.memory_cases import SUITES, case_arguments, suite
from megatron.sft.planning.memory import GIB
from megatron.sft.planning.memory_phases import PHASES

LAYERS, VOCABULARY, HIDDEN = 4, 2048, 128


def _save_model(folder: Path) -> Path:
    """A config.json alone: weights are random and made in place."""
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "torch_dtype": "bfloat16", "hidden_act": "silu"}
    config |= {"hidden_size": HIDDEN, "intermediate_size": 512, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0, "tie_word_embeddings": True}))
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of the suite `tiny`, on the CPU."""
    folder = tmp_path_factory.mktemp("memory")
    words = ["--suite", "tiny", "--model", str(_save_model(folder / "model")), "--output", str(folder / "results")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGATRON_SFT_DEVICE", "cpu")
        assert memory.main(words) == 1  # fp8 fails
    return [json.loads(line) for line in (folder / "results").read_text().splitlines()]


@pytest.mark.timeout(300)
def test_every_case_goes_through_every_phase_and_one_that_fails_stops_no_other(results: list[dict[str, Any]]) -> None:
    *good, fp8 = results
    assert len(good) == 5 and "Transformer Engine" in fp8["failed"]
    every = [*PHASES, "looking for a bad row"]
    # A state that was filled once is not filled again.
    assert [list(each["phases"]) == every for each in good] == [True, False, False, False, True]
    assert all(each["seconds"] > 0 and each["decides"] == "forward and backward" for each in good)
    assert all(f"| `{each['case']}` |" in memory.row(each) for each in results)


def test_what_is_measured_is_what_plan_estimates(results: list[dict[str, Any]]) -> None:
    embedding = VOCABULARY * HIDDEN * 4 / GIB
    for result in results[:-1]:
        phases = result["phases"]
        # Not twice the weights, which their buffer is filled with: one parameter at most.
        building = phases["building"]
        assert 0.99 * building["estimate"] < building["peak"] < 1.01 * building["estimate"] + embedding
        # What is freed between two phases is not seen, and then counted on.
        assert 0.97 < phases["optimizer step"]["rest"] / phases["optimizer step"]["estimate"] < 1.25
        # On a CPU, steps and conversions make copies that the GPU's kernels do not.
        for name in ("saving", "resuming"):
            assert name not in phases or phases[name]["peak"] < phases["forward and backward"]["peak"]
    # What each way of recomputing keeps less than the one before.
    peaks = [each["phases"]["forward and backward"]["peak"] for each in results[:4]]
    kept = [each["parts"]["activations"] for each in results[:4]]
    for index in range(3):
        assert peaks[index] - peaks[index + 1] == pytest.approx(kept[index] - kept[index + 1], rel=0.15)


def test_the_cases_of_every_suite_can_be_read() -> None:
    for name in SUITES:
        for case in suite(name):
            arguments = case_arguments(case)
            assert (arguments.steps, arguments.warm_up) == (2, 1) and arguments.gpus in (1, 2)


def test_the_worst_estimates_are_named() -> None:
    def result(case: str, peak: float, estimate: float) -> dict[str, object]:
        return {"case": case, "phases": {"forward and backward": {"peak": peak, "estimate": estimate}}}

    text = memory.worst([result("low", 10.0, 9.0), result("good", 10.0, 10.1), result("high", 10.0, 11.0)])
    assert "lowest estimate -10.0 % (low" in text and "highest +10.0 % (high" in text
