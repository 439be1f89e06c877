"""Runs on pairs: what they log, that they continue exactly, the check of their first step, and the reference that they make."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.sft.data.tokenized import data_file
from megatron.sft.runtime.manifest import sealed, sha256_of_file, write_json
from tests.support import pair_material as material
from tests.support import tiny

NUM_ROWS, LENGTH = 24, 128
DPO = ["--objective", "dpo", "--dpo-beta", "0.5"]
VALIDATION = ["--split", "80,20,0", "--eval-interval", "5", "--save-interval", "5"]
METRICS = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of tokenised pairs."""
    prefix = tmp_path_factory.mktemp("pairs") / "pairs.v1"
    return material.write_pair_rows(prefix, material.random_pair_rows(NUM_ROWS, LENGTH), LENGTH)


@pytest.fixture(scope="module")
def other(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model near the tiny one, converted."""
    folder = tmp_path_factory.mktemp("other")
    material.save_changed(tiny_qwen2, folder / "hf", by=0.02)
    tiny.run_module("convert", "--hf-dir", folder / "hf", "--output", folder / "ckpt")
    return folder / "ckpt"


@pytest.fixture(scope="module")
def run(train: Callable[..., Path], pairs: Path) -> Path:
    """10 steps in one process against the start, with validation and a checkpoint after 5."""
    return train(1, *DPO, *VALIDATION, "--sft-weight", "0.1", data=pairs)


def test_a_fresh_run_begins_at_ln_2_and_logs_every_metric(run: Path) -> None:
    lines = tiny.metrics(run)
    steps, validations = ([line for line in lines if key in line] for key in ("lr", "validation_loss"))
    assert len(steps) == 10 and len(validations) == 2
    first = steps[0]
    assert first["preference_loss"] == math.log(2) == pytest.approx(first["loss"] - 0.1 * first["sft_loss"])
    assert {first[name] for name in METRICS if name.startswith("rewards")} == {0.0}
    for line in [*steps, *validations]:
        assert line.keys() >= METRICS | {"preference_loss", "sft_loss"}
    # It learns the rows that it trains on.
    assert steps[-1]["rewards/margins"] > 0.5 and steps[-1]["rewards/accuracies"] > 0.8
    assert steps[-1]["preference_loss"] < first["preference_loss"]


def test_five_and_five_resumed_steps_are_ten(train: Callable[..., Path], run: Path, pairs: Path, tmp_path: Path) -> None:
    resumed = tiny.as_of(5, run, tmp_path / "resumed")
    train(1, *DPO, *VALIDATION, "--sft-weight", "0.1", mode="resume", save=resumed, data=pairs)
    names = ("iteration", "loss", "validation_loss", "grad_norm", "preference_loss", "sft_loss", *METRICS)
    ours, theirs = ([{name: line.get(name) for name in names} for line in tiny.metrics(folder)] for folder in (resumed, run))
    assert ours == theirs
    for kept in ("iter_0000005", "iter_0000010"):
        manifests = [json.loads((folder / kept / "manifest.json").read_text()) for folder in (run, resumed)]
        assert manifests[0]["files"] == manifests[1]["files"]
        assert manifests[0]["training"]["reference"] == manifests[1]["training"]["reference"]


KINDS = {
    "fp32": [],
    "fp32, recomputed in part": ["--recompute", "selective"],
    "fp32, recomputed": ["--recompute", "full"],
    "bf16": ["--precision", "bf16"],
    "fp16": ["--precision", "fp16"],
    "adapters": ["--lora-rank", "4"],
    "adapters with dropout": ["--lora-rank", "4", "--lora-dropout", "0.2"],
    "16-bit moments": ["--precision", "bf16", "--optimizer-precision", "bf16"],
}


def test_every_precision_begins_at_ln_2_and_recomputing_changes_nothing(train: Callable[..., Path], pairs: Path) -> None:
    found = {}
    for kind, words in KINDS.items():
        run = train(
            1, *DPO, *words, "--train-iters", 4, "--reference-logps", pairs.with_name(kind.partition(",")[0]), data=pairs
        )
        found[kind] = tiny.losses(run)
        assert found[kind][0] == math.log(2), kind
        assert found[kind][-1] < math.log(2), kind
    assert found["fp32, recomputed in part"] == found["fp32"] == found["fp32, recomputed"]
    for kind in ("bf16", "fp16"):
        assert found[kind] == pytest.approx(found["fp32"], rel=2e-2)


def expected_logps(model_folder: Path) -> np.ndarray:
    """By transformers, every answer alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    found = []
    for row in material.random_pair_rows(NUM_ROWS, LENGTH):
        for pair in row:
            for answer in (pair.chosen, pair.rejected):
                ids = torch.tensor([pair.prompt + answer])
                with torch.no_grad():
                    scores = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
                found.append(scores.gather(1, ids[0, 1:, None])[len(pair.prompt) - 1 :, 0].numpy())
    return np.concatenate(found)


@pytest.mark.parametrize("layout", ["1", "TP2 x PP2", "CP2"])
def test_reference_log_probabilities_are_those_of_transformers(
    converted: Path, tiny_qwen2: Path, pairs: Path, tmp_path: Path, layout: str
) -> None:
    sizes = {"1": (1, []), "CP2": (2, ["--context-parallel-size", "2"])}
    sizes["TP2 x PP2"] = (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"])
    processes, words = sizes[layout]
    common = ["--load", converted, "--data-path", pairs, "--save", tmp_path / "run", "--precision", "fp32", *DPO]
    common += ["--global-batch-size", "8", "--micro-batch-size", "2", "--reference-logps", tmp_path / "logps"]
    tiny.launch(processes, "train", "reference", *common, *words)
    assert not (tmp_path / "run").exists()
    logps = np.fromfile(tmp_path / "logps.bin", dtype=np.float32)
    np.testing.assert_allclose(logps, expected_logps(tiny_qwen2), atol=1e-5)


def test_an_interrupted_pass_continues_where_it_was(converted: Path, pairs: Path, tmp_path: Path) -> None:
    common = ["--load", converted, "--data-path", pairs, "--save", tmp_path / "run", "--precision", "fp32", *DPO]
    common += ["--global-batch-size", "4", "--reference-logps", tmp_path / "logps"]
    stopped = tiny.launch(1, "train", "reference", *common, "--exit-after-minutes", "1e-6", status=75)
    assert "4 of 24 rows" in stopped and not (tmp_path / "logps.json").exists()
    assert "continued at row 4" in tiny.launch(1, "train", "reference", *common)
    whole = [*common, "--reference-logps", tmp_path / "whole"]
    # A partial file that is not what its record says is not continued.
    tiny.launch(1, "train", "reference", *whole, "--exit-after-minutes", "1e-6", status=75)
    partial = tmp_path / ".whole.partial.bin"
    partial.write_bytes(b"\0" * 4 + partial.read_bytes()[4:])
    assert "continued" not in tiny.launch(1, "train", "reference", *whole)
    assert (tmp_path / "whole.bin").read_bytes() == (tmp_path / "logps.bin").read_bytes()
    assert not list(tmp_path.glob(".*.partial.*"))


def test_a_reference_that_is_not_the_start_it_claims_to_be_stops_the_first_step(
    converted: Path, other: Path, pairs: Path, tmp_path: Path
) -> None:
    """The numbers of another model under a manifest that names the start. With REFERENCE it is logged only."""
    common = ["--load", converted, "--data-path", pairs, "--precision", "fp32", "--global-batch-size", "8", *DPO]
    common += ["--train-iters", "1", "--reference-logps", tmp_path / "logps"]
    tiny.launch(1, "train", "train", *common, "--save", tmp_path / "known", "--reference", other)
    assert tiny.metrics(tmp_path / "known")[0]["rewards/chosen"] != 0.0
    made = json.loads((tmp_path / "logps.json").read_text())
    own = ["--reference-logps", tmp_path / "own"]
    tiny.launch(1, "train", "reference", *common, *own, "--save", tmp_path / "none")
    start = json.loads((tmp_path / "own.json").read_text())["reference_of"]
    write_json(tmp_path / "logps.json", sealed({**made, "reference_of": start}))
    output = tiny.launch(1, "train", "train", *common, "--save", tmp_path / "run", status=2)
    assert str(tmp_path / "logps.json") in output and "0.693147" in output
    assert not list((tmp_path / "run").glob("iter_*"))


def test_next_to_data_that_cannot_be_written_to_the_reference_is_in_the_folder_of_the_run(
    converted: Path, pairs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for ending in ("bin", "idx", "json"):
        data_file(folder / "pairs", ending).write_bytes(data_file(pairs, ending).read_bytes())
    # A folder in the file's place, since these tests may run as a user who may write anywhere.
    (folder / ".pairs.reference.partial.bin").mkdir()
    common = ["--load", converted, "--data-path", folder / "pairs", "--save", tmp_path / "run", "--precision", "fp32", *DPO]
    output = tiny.launch(1, "train", "train", *common, "--global-batch-size", "8", "--train-iters", "1")
    assert re.search(r"note: .*data", output)
    assert (tmp_path / "run" / "reference.bin").stat().st_size and len(tiny.losses(tmp_path / "run")) == 1


def test_a_reference_is_listed_with_its_checksum(run: Path, pairs: Path) -> None:
    manifest = json.loads(data_file(pairs.with_name("pairs.v1.reference"), "json").read_text())
    path = data_file(pairs.with_name("pairs.v1.reference"), "bin")
    assert manifest["files"] == {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}}
    saved = json.loads((run / "iter_0000010" / "manifest.json").read_text())["training"]["reference"]
    assert saved == {name: manifest["reference_of"][name] for name in ("checkpoint", "precision")}
