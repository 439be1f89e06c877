"""A checkpoint of adapters holds adapters alone, continues exactly, and only over the weights that they were trained on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.sft.checkpoint.folder import open_checkpoint
from megatron.sft.families.registry import read_architecture
from megatron.sft.planning.options import TrainOptions
from megatron.sft.planning.resolution import checkpoint_bytes
from megatron.sft.planning.trained_part import trained_part
from tests.support import tiny
from tests.support.adapter_case import OPTIONS, STEPS, Case, assert_only_adapters
from tests.support.layout_worker import stored_tensors

LORA = ["--lora-rank", "4", "--lora-dropout", "0.1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its conversion, data, and a run of adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    model = tiny.save_qwen2(folder / "hf", tied=False)
    tiny.run_module("convert", "--source", model, "--output", folder / "base")
    tiny.write_rows(folder / "data", tiny.random_rows(16, 96), 96)
    train(folder, "train", folder / "run", folder / "base", *LORA)
    return folder


def train(made: Path, mode: str, save: Path, load: Path, *more: object, status: int = 0) -> str:
    arguments = [mode, "--load", load, "--data-path", made / "data", "--save", save, *OPTIONS, *more]
    return tiny.run_module("train", *arguments, status=status)


@pytest.fixture
def half(made: Path, tmp_path: Path) -> Path:
    """The run as it was after two steps."""
    return tiny.as_of(2, made / "run", tmp_path / "run")


def assert_continued(made: Path, run: Path) -> None:
    """To the last bit as if it had not stopped."""
    assert tiny.losses(run)[-3:] == tiny.losses(made / "run")[-3:]
    ours, theirs = (stored_tensors(folder / f"iter_{STEPS:07d}") for folder in (run, made / "run"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def error_of(output: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return line


def test_a_checkpoint_holds_adapters_alone_and_is_as_large_as_the_plan_says(made: Path) -> None:
    checkpoint = open_checkpoint(made / "run")
    stored = stored_tensors(checkpoint.path)
    names = {name for name in stored if not name.startswith("optimizer.")}
    assert len(names) == 3 * 7 * 2 and all(".lora_" in name for name in names)
    assert_only_adapters(stored, names)
    shape = read_architecture(json.loads((made / "hf" / "config.json").read_text()), "config.json")
    options = TrainOptions(made / "base", made / "data", made / "run", precision="fp32", lora_rank=4)
    expected = checkpoint_bytes(options, shape, trained_part(options, shape))
    assert sum(tensor.nbytes for tensor in stored.values()) == expected
    on_disk = sum(file.stat().st_size for file in checkpoint.path.iterdir())
    assert on_disk < expected + 4096 * (len(stored) + 2)  # each tensor is a small archive of its own


def test_a_base_that_moved_or_was_converted_otherwise_is_the_same_base(made: Path, half: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "base", tmp_path / "moved")
    train(made, "resume", half, tmp_path / "moved", *LORA)
    assert_continued(made, half)
    again = tiny.as_of(2, made / "run", tmp_path / "again")
    classic = ["--ckpt-format", "torch", "--tensor-model-parallel-size", 2]
    tiny.run_module("convert", "--source", made / "hf", "--output", tmp_path / "classic", *classic)
    train(made, "resume", again, tmp_path / "classic", *LORA)
    assert_continued(made, again)


def test_another_base_a_missing_one_and_adapters_as_a_base_are_refused(made: Path, half: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(made / "hf", tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    tiny.run_module("convert", "--source", other, "--output", tmp_path / "other_base")
    line = error_of(train(made, "resume", half, tmp_path / "other_base", *LORA, status=2))
    assert (
        f"PRETRAIN_CHECKPOINT_PATH {tmp_path / 'other_base'} does not hold the weights" in line and str(made / "base") in line
    )
    line = error_of(train(made, "resume", half, tmp_path / "nowhere", *LORA, status=2))
    assert f"PRETRAIN_CHECKPOINT_PATH {tmp_path / 'nowhere'} does not exist" in line and str(made / "base") in line
    for mode, save in (("resume", half), ("train", tmp_path / "new")):
        line = error_of(train(made, mode, save, made / "run", *LORA, status=2))
        assert f"{made / 'run' / f'iter_{STEPS:07d}'} holds adapters" in line, line
    line = error_of(train(made, "train", tmp_path / "new", made / "run", status=2))
    assert "holds adapters" in line and "MERGE=1" in line
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").glob("iter_*"))


def test_what_is_trained_may_not_change_and_how_is_reported(made: Path, half: Path, tmp_path: Path) -> None:
    base = made / "base"
    line = error_of(train(made, "resume", half, base, status=2))
    assert "LORA_RANK was 4 in" in line and "is 0 now" in line
    line = error_of(train(made, "resume", half, base, "--lora-rank", "8", status=2))
    assert "LORA_RANK was 4 in" in line and "is 8 now" in line
    output = train(made, "resume", half, base, "--lora-rank", "4", "--lora-plus", "2")
    assert "changed since iteration 2: LORA_DROPOUT from 0.1 to 0.0" in output
    assert "changed since iteration 2: LORA_PLUS from 1.0 to 2.0" in output
    full = tmp_path / "full"
    train(made, "train", full, base, "--train-iters", "2")
    line = error_of(train(made, "resume", full, base, *LORA, status=2))
    assert "LORA_RANK was 0 in" in line and "docs/lora.md" in line


def test_commands_that_need_a_whole_model_refuse_adapters_by_name(made: Path, tmp_path: Path) -> None:
    run, model, out = made / "run", made / "hf", tmp_path / "out"
    for module, arguments in (
        ("convert", ["--source", run, "--hf-dir", model, "--output", out]),
        ("compare_logits", ["--load", run, "--hf-dir", model]),
    ):
        line = error_of(tiny.run_module(module, *arguments, status=2))
        assert f"{run / f'iter_{STEPS:07d}'} holds adapters" in line and not out.exists(), line
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    line = error_of(tiny.run_module("convert", "--source", adapter, "--output", out, status=2))
    assert f"{adapter} is a PEFT adapter" in line and "LORA_INIT_FROM" in line


def test_a_run_of_all_weights_can_be_the_base_of_adapters(made: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    train(made, "train", full, made / "base", "--train-iters", "2", "--lr", "1e-3")
    run = tmp_path / "run"
    train(made, "train", run, full, *LORA, "--train-iters", "3")
    started = tiny.losses(run)
    again = tiny.as_of(1, run, tmp_path / "again")
    train(made, "resume", again, full, *LORA, "--train-iters", "3")
    assert tiny.losses(again)[-2:] == started[-2:]
    # Resharded it still says what it was converted from once, whose weights it no longer has.
    tiny.run_module("convert", "--source", full, "--output", tmp_path / "resharded")
    line = error_of(train(made, "resume", tiny.as_of(2, made / "run", tmp_path / "x"), tmp_path / "resharded", *LORA, status=2))
    assert "does not hold the weights" in line
    # It goes on and its newest checkpoint is another: the one below the adapters must be named.
    train(made, "resume", full, made / "base", "--train-iters", "3", "--lr", "1e-3")
    again = tiny.as_of(1, run, tmp_path / "once more")
    line = error_of(train(made, "resume", again, full, *LORA, "--train-iters", "3", status=2))
    assert "does not hold the weights" in line and str(full / "iter_0000002") in line


def test_adapters_of_experts_continue_in_other_layouts(tmp_path: Path) -> None:
    case = Case(tmp_path, "qwen3_moe")
    options = ["--lora-rank", "4", "--lora-targets", "all,experts", "--lr", "1e-2"]
    whole = case.train("EP2 x TP2", *options, adapter=False)
    saved = stored_tensors(whole / "iter_0000002")
    assert len(saved) == 4 * 2 * 5 * (4 + 3 * 8)
    for layout in ("1x1", "EP2", "TP2"):
        again = tiny.as_of(2, whole, tmp_path / f"again {layout}")
        case.train(layout, *options, name=again.name, mode="resume", adapter=False)
        assert tiny.losses(again) == pytest.approx(tiny.losses(whole), rel=1e-5)


def test_adapters_over_a_run_of_all_weights_are_exported_for_its_export(made: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    full, run, model = tmp_path / "full", tmp_path / "run", made / "hf"
    train(made, "train", full, made / "base", "--train-iters", "2", "--lr", "1e-2")
    train(made, "train", run, full, "--lora-rank", "4", "--train-iters", "3", "--lr", "1e-2")
    line = error_of(tiny.run_module("export", "--load", run, "--hf-dir", model, "--output", tmp_path / "wrong", status=2))
    assert f"were trained on {full / 'iter_0000002'}" in line and "MERGE=1" in line and not (tmp_path / "wrong").exists()
    tiny.run_module("export", "--load", full, "--hf-dir", model, "--output", tmp_path / "full_hf")
    tiny.run_module("export", "--load", run, "--hf-dir", tmp_path / "full_hf", "--output", tmp_path / "adapter")
    tiny.run_module("export", "--load", run, "--hf-dir", model, "--output", tmp_path / "merged", "--merge", "--verify", "auto")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "full_hf")
    PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "theirs")
    tiny.assert_same_weights(tmp_path / "merged", tmp_path / "theirs")


def test_an_adapter_that_is_continued_is_needed_for_the_start_alone(made: Path, tmp_path: Path) -> None:
    from tests.support import peft_oracle

    adapter = peft_oracle.save_adapter(made / "hf", tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    whole = tmp_path / "whole"
    train(made, "train", whole, made / "base", "--lora-init-from", adapter, "--train-iters", "3")
    again = tiny.as_of(1, whole, tmp_path / "again")
    shutil.rmtree(adapter)
    train(made, "resume", again, made / "base", "--lora-init-from", adapter, "--train-iters", "3")
    assert tiny.losses(again)[-2:] == tiny.losses(whole)[-2:]
