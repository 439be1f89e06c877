"""What is proposed to a run that does not fit: changes that do, the cheapest first."""

from dataclasses import replace

from megatron.sft.hf.published_configs import find_architecture
from megatron.sft.model.layout import Layout
from megatron.sft.planning.fitting.changes import Candidate, changes_text, cheapest_changes
from megatron.sft.planning.memory import GIB, MemorySettings, estimate

SMALL, _ = find_architecture("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")
LARGE, _ = find_architecture("Qwen/Qwen2.5-7B-Instruct")
ROW = MemorySettings(16384, num_micro_batches=4)


def proposals(start: Candidate, gib: float) -> list[str]:
    """In words; every one of them fits, as it is said."""
    found = cheapest_changes(start, int(gib * GIB))
    assert all(each.fits(int(gib * GIB)) for each in found) and not start.fits(int(gib * GIB))
    assert [each.cost for each in found] == sorted(each.cost for each in found)
    return [" ".join(each.words) for each in found]


def test_a_little_too_much_is_recomputed_and_much_too_much_needs_other_settings() -> None:
    start = Candidate(SMALL, Layout(), 1, 4, ROW)
    assert proposals(start, 60)[0] == "RECOMPUTE=selective"
    words = proposals(start, 50)
    assert words[0].startswith("OPTIMIZER_PRECISION=bf16") and any(each.startswith("RECOMPUTE_LAYERS=") for each in words)
    assert any(each.startswith("OPTIMIZER_OFFLOAD=") for each in words)
    assert any(each.startswith("TENSOR_PARALLEL_SIZE=2 SEQUENCE_PARALLEL=1 on 2 GPUs") for each in words)
    assert any(each.startswith("rows of 8192 tokens") for each in words)
    text = changes_text(start, 50 * GIB)
    assert text.startswith(f"the cheapest change that fits is {words[0]}") and words[1] in text


def test_words_for_recomputation_take_back_what_they_do_not_go_with() -> None:
    short = replace(ROW, seq_length=1024)
    one = replace(short, recompute="selective", recompute_layers=1)
    for asked, settings, words, gib in (
        (("none", 0), ROW, "RECOMPUTE_LAYERS=", 50.0),
        (("auto", 0), ROW, "RECOMPUTE=selective RECOMPUTE_LAYERS=", 50.0),
        (("none", 1), one, "RECOMPUTE=full RECOMPUTE_LAYERS=0", 31.2 / 0.96),
    ):
        assert any(each.startswith(words) for each in proposals(Candidate(SMALL, Layout(), 1, 4, settings, asked), gib)), words


def test_what_the_run_has_already_or_cannot_have_is_not_proposed() -> None:
    asked = replace(ROW, recompute="full", optimizer_precision="bf16", seq_length=1024)
    words = proposals(Candidate(SMALL, Layout(2), 2, 4, asked), 10)
    assert not [each for each in words if "bf16" in each or "OFFLOAD" in each or "RECOMPUTE=full" in each]
    # Two KV heads: no TP 4. Three rows a step: no two copies.
    assert not [each for each in proposals(Candidate(SMALL, Layout(2), 2, 3, asked), 10) if "TENSOR_PARALLEL" in each]


def test_smaller_micro_batches_and_sequence_parallelism_come_before_what_costs_more() -> None:
    several = Candidate(SMALL, Layout(), 1, 4, replace(ROW, micro_batch_size=2, num_micro_batches=2))
    assert proposals(several, 75)[0] == "MICRO_BATCH_SIZE=1"
    split = Candidate(LARGE, Layout(2), 2, 4, replace(ROW, optimizer_precision="bf16", recompute="selective", seq_length=8192))
    need = estimate(LARGE, Layout(2), 1, split.settings).total / GIB / 0.97
    assert proposals(split, need)[0] == "SEQUENCE_PARALLEL=1"


def test_moments_of_8_bits_are_proposed_where_16_are_too_many() -> None:
    short = Candidate(SMALL, Layout(), 1, 4, replace(ROW, seq_length=4096))
    assert not any("8bit" in each for gib in (38, 30, 24) for each in proposals(short, gib))
    assert proposals(short, 20)[0].startswith("OPTIMIZER_PRECISION=8bit (")
    in_16 = replace(short, settings=replace(short.settings, optimizer_precision="bf16", recompute="full"))
    assert proposals(in_16, 20)[0].startswith("OPTIMIZER_PRECISION=8bit (")


def test_two_changes_are_tried_where_one_is_too_little_and_nothing_is_said_plainly() -> None:
    asked = replace(ROW, micro_batch_size=4, num_micro_batches=1, precision="fp8", recompute="full")
    words = proposals(Candidate(SMALL, Layout(), 1, 4, asked), 25)
    assert words and all(each.count("=") >= 2 or "tokens" in each or "GPUs" in each for each in words)
    assert "no change of one or two settings fits" in changes_text(Candidate(LARGE, Layout(), 1, 4, ROW), GIB)
