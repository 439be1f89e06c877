"""Training in real processes: every layout gives the same losses, and they are transformers' own."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.sft.data.row_order import RowOrder, split_rows
from megatron.sft.planning.options import parse
from megatron.sft.planning.resolution import plan_run
from megatron.sft.runtime.errors import UserError
from tests.support import tiny

LAYOUTS = {
    "TP2": (2, ["--tensor-model-parallel-size", "2"]),
    "PP2": (2, ["--pipeline-model-parallel-size", "2"]),
    "TP2 x PP2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
    "DP2": (2, []),
    "TP2 + sequence parallel": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel", "1"]),
}
VALIDATION = ["--split", "90,10,0", "--eval-interval", "5", "--save-interval", "5"]


@pytest.fixture(scope="module")
def reference(train: Callable[..., Path]) -> Path:
    """10 steps in one process, with validation and a checkpoint after 5."""
    return train(1, *VALIDATION)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_losses(train: Callable[..., Path], reference: Path, layout: str) -> None:
    processes, options = LAYOUTS[layout]
    run = train(processes, *VALIDATION, *options)
    assert len(tiny.losses(run)) == 10
    assert tiny.losses(run) == pytest.approx(tiny.losses(reference), rel=1e-6)
    assert tiny.validation_losses(run) == pytest.approx(tiny.validation_losses(reference), rel=1e-6)
    norms = [line["grad_norm"] for line in tiny.metrics(run) if "grad_norm" in line]
    expected = [line["grad_norm"] for line in tiny.metrics(reference) if "grad_norm" in line]
    assert norms == pytest.approx(expected, rel=1e-4)


def test_losses_are_those_of_the_same_training_in_transformers(reference: Path, tiny_qwen2: Path) -> None:
    """transformers and torch's AdamW, every conversation alone, the mean over all trained tokens of the global batch."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    rows = tiny.random_rows(64, 128)
    training, _ = split_rows(64, 0.9, 0.1, seed=1234)
    order = RowOrder(training, seed=1234)
    expected = []
    for step in range(5):
        # Cosine from 1e-3 to 1e-4 over 10 steps; 5 % of 10 steps is no warm-up.
        rate = 1e-4 + 9e-4 * 0.5 * (1 + np.cos(np.pi * (step + 1) / 10))
        conversations = [c for i in range(8) for c in rows[order.row_at(8 * step + i)]]
        total, count = torch.zeros(()), 0
        for prompt, answer in conversations:
            ids = torch.from_numpy(np.concatenate([prompt, answer]))
            log_p = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
            picked = log_p[torch.arange(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]]
            total, count = total - picked.sum(), count + len(answer)
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        optimizer.step()
        expected.append(loss.item())
    assert tiny.losses(reference)[:5] == pytest.approx(expected, rel=1e-5)


def test_packed_rows_train_like_one_conversation_a_row(train: Callable[..., Path], tmp_path: Path) -> None:
    rows = tiny.random_rows(8, 128)
    alone = [[conversation] for row in rows for conversation in row]
    size = str(len(alone))
    packed_data = tiny.write_rows(tmp_path / "packed", rows, 128)
    alone_data = tiny.write_rows(tmp_path / "alone", alone, 128)
    steps = ["--train-iters", "4"]
    for average in ("token", "conversation"):
        options = [*steps, "--loss-average", average]
        packed = train(1, *options, data=packed_data)
        unpacked = train(1, *options, "--global-batch-size", size, "--micro-batch-size", "1", data=alone_data)
        assert tiny.losses(packed) == pytest.approx(tiny.losses(unpacked), rel=1e-6)


def test_five_and_five_resumed_steps_are_ten(train: Callable[..., Path], reference: Path, tmp_path: Path) -> None:
    run = tiny.as_of(5, reference, tmp_path / "resumed")
    train(1, *VALIDATION, mode="resume", save=run)
    assert tiny.losses(run) == tiny.losses(reference)
    assert tiny.validation_losses(run) == tiny.validation_losses(reference)


@pytest.mark.parametrize("layout", ["TP2 x PP2", "DP2"])
def test_a_run_resumes_in_another_layout(train: Callable[..., Path], reference: Path, tmp_path: Path, layout: str) -> None:
    processes, options = LAYOUTS[layout]
    run = tiny.as_of(5, reference, tmp_path / "resumed")
    train(processes, *VALIDATION, *options, mode="", save=run)
    assert tiny.losses(run) == pytest.approx(tiny.losses(reference), rel=1e-6)


def test_bf16_training_lowers_the_loss_and_resumes_exactly(train: Callable[..., Path], tmp_path: Path) -> None:
    options = ["--precision", "bf16", "--save-interval", "5", "--tensor-model-parallel-size", "2"]
    run = train(2, *options)
    assert tiny.losses(run)[-1] < tiny.losses(run)[0]
    resumed = tiny.as_of(5, run, tmp_path / "resumed")
    train(2, *options, mode="resume", save=resumed)
    assert tiny.losses(resumed) == tiny.losses(run)


def test_train_and_resume_refuse_the_wrong_folder(converted: Path, packed_rows: Path, reference: Path, tmp_path: Path) -> None:
    common = ["--load", converted, "--data-path", packed_rows, "--train-iters", "10", "--global-batch-size", "8"]
    output = tiny.run_module("train", "train", *common, "--save", reference, status=2)
    assert output.startswith(f"error: OUTPUT_PATH {reference} ") and output.count("\n") == 1
    assert "iteration 10" in output and "resume" in output
    output = tiny.run_module("train", "resume", *common, "--save", tmp_path / "none", status=2)
    assert output.startswith(f"error: OUTPUT_PATH {tmp_path / 'none'} ") and output.count("\n") == 1
    assert "train" in output
    assert not (tmp_path / "none").exists()


def test_resume_refuses_other_data_and_another_seed(
    converted: Path, packed_rows: Path, reference: Path, tmp_path: Path
) -> None:
    other = tiny.write_rows(tmp_path / "other", tiny.random_rows(64, 128, seed=1), 128)
    common = ["resume", "--load", converted, "--save", reference, "--train-iters", "20", "--precision", "fp32"]
    same = [*common, "--global-batch-size", "8", "--split", "90,10,0"]
    assert "DATA_PATH's content was checksum" in tiny.run_module("train", *same, "--data-path", other, status=2)
    output = tiny.run_module("train", *same, "--data-path", packed_rows, "--seed", "7", status=2)
    assert "error: SEED was 1234" in output and "is 7 now" in output


WRONG = {
    "TP times PP does not divide the processes": (
        ["--pipeline-model-parallel-size", "2"],
        "1 processes cannot hold TP 1 x PP 2",
    ),
    "batch sizes that do not divide": (["--micro-batch-size", "3"], "GLOBAL_BATCH_SIZE=8 is not a multiple"),
    "another row length": (["--seq-length", "64"], "row length 128 in"),
    "a warm-up longer than the run": (["--lr-warmup-iters", "10"], "LR_WARMUP_ITERS=10 must be less than the 10 steps"),
    "a number that is none": (["--lr", "fast"], "LR: invalid float value: 'fast'"),
    "shares that are none": (["--split", "all"], "SPLIT='all' is not up to three shares"),
    "no checkpoint there": (["--load", "/nowhere"], "PRETRAIN_CHECKPOINT_PATH /nowhere does not exist"),
    "no data there": (["--data-path", "/nowhere"], "DATA_PATH /nowhere does not exist"),
    "an unknown mode": (["again"], "invalid choice: 'again'"),
    "an unknown option": (["--learning-rate=1"], "unrecognized arguments: --learning-rate=1"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_setting_is_refused_by_name(converted: Path, packed_rows: Path, tmp_path: Path, what: str) -> None:
    options, reason = WRONG[what]
    common = ["--load", converted, "--data-path", packed_rows, "--save", tmp_path / "run"]
    arguments = [*map(str, common), "--train-iters", "10", "--global-batch-size", "8", *options]
    with pytest.raises(UserError, match=re.escape(reason)):
        plan_run(*parse(arguments), num_processes=1)


def test_a_wrong_setting_gives_one_line_whatever_the_processes(converted: Path, packed_rows: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    arguments = ["--load", converted, "--data-path", packed_rows, "--save", save, "--tensor-model-parallel-size", "3"]
    output = tiny.launch(3, "train", *arguments, status=2)
    assert output == ("error: TP=3 does not divide the model's 4 attention heads and 2 KV heads: choose TP from 1, 2\n")
    assert not save.exists()
