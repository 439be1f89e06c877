"""Mistakes with pairs and references: each is named, with what to do, on one line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.sft.data.tokenized import data_file
from megatron.sft.planning import input_checks
from megatron.sft.planning.options import parse
from megatron.sft.planning.resolution import plan_run
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import sealed, write_json
from megatron.sft.training.same_run import check_same_run
from tests.support import pair_material as material
from tests.support import tiny

NUM_ROWS, LENGTH = 8, 128


@pytest.fixture(scope="module")
def made(converted: Path, tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs, their reference next to them, pairs packed otherwise, and another model."""
    folder = tmp_path_factory.mktemp("made")
    rows = material.random_pair_rows(NUM_ROWS, LENGTH)
    material.write_pair_rows(folder / "pairs", rows, LENGTH)
    single = [[pair] for row in rows for pair in row]
    material.write_pair_rows(folder / "alone", single, LENGTH)
    material.write_pair_rows(folder / "others", material.random_pair_rows(NUM_ROWS, LENGTH, seed=1), LENGTH)
    material.save_changed(tiny_qwen2, folder / "other_hf", by=0.02)
    tiny.run_module("convert", "--hf-dir", folder / "other_hf", "--output", folder / "other")
    common = ["--load", converted, "--data-path", folder / "pairs", "--save", folder / "none", "--global-batch-size", "8"]
    tiny.launch(1, "train", "reference", *common, "--objective", "dpo", "--precision", "fp32")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "made"))


def _refused(folder: Path, converted: Path, *words: object) -> str:
    """The reason why a run of these settings does not start."""
    common = ["train", "--load", converted, "--data-path", folder / "pairs", "--save", folder / "run", "--objective", "dpo"]
    common += ["--precision", "fp32", "--train-iters", "2", "--global-batch-size", "8", *words]
    with pytest.raises(UserError) as refused:
        input_checks.check(plan_run(*parse(list(map(str, common))), num_processes=1))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def _change(path: Path, **fields: Any) -> None:
    manifest = json.loads(path.read_text())
    write_json(path, sealed({**manifest, **fields}))


def test_a_reference_of_another_model_data_packing_or_precision_is_named(folder: Path, converted: Path) -> None:
    logps = folder / "pairs.reference.json"
    reason = _refused(folder, converted, "--reference", folder / "other")
    # The copied data has the seal of its first place, which is what the checksums are about.
    assert str(logps) in reason and f"set REFERENCE={converted}" in reason and "4_train.sh reference" in reason
    reason = _refused(folder, converted, "--load", folder / "other")
    assert f"are of the model {converted}" in reason and str(folder / "other") in reason
    for data in ("alone", "others"):
        reason = _refused(folder, converted, "--data-path", folder / data, "--reference-logps", folder / "pairs.reference")
        assert str(logps) in reason and f"are of other data than {folder / data} holds" in reason
    reason = _refused(folder, converted, "--precision", "bf16")
    assert str(logps) in reason and "were made in fp32, this run computes in bf16: set PRECISION=fp32" in reason


def _cut(folder: Path) -> None:
    path = folder / "pairs.reference.bin"
    path.write_bytes(path.read_bytes()[:-8])


def _flip(folder: Path) -> None:
    path = folder / "pairs.reference.bin"
    content = bytearray(path.read_bytes())
    content[17] ^= 1
    path.write_bytes(content)


def _remove(folder: Path) -> None:
    (folder / "pairs.reference.bin").unlink()


def _cut_manifest(folder: Path) -> None:
    path = folder / "pairs.reference.json"
    path.write_text(path.read_text()[:40])


def _edit_manifest(folder: Path) -> None:
    path = folder / "pairs.reference.json"
    path.write_text(path.read_text().replace('"precision": "fp32"', '"precision": "bf16"'))


def _another_manifest(folder: Path) -> None:
    (folder / "pairs.reference.json").write_bytes((folder / "pairs.json").read_bytes())


def _outside(folder: Path) -> None:
    path = folder / "pairs.reference.json"
    facts = json.loads(path.read_text())["files"]["pairs.reference.bin"]
    _change(path, files={"../pairs.reference.bin": facts})


def _fewer_tokens(folder: Path) -> None:
    """A whole file of other numbers, with a manifest that fits it but not the data."""
    path = folder / "pairs.reference.bin"
    path.write_bytes(path.read_bytes()[:-8])
    facts = {"bytes": path.stat().st_size, "sha256": "0" * 64}
    _change(folder / "pairs.reference.json", files={path.name: facts})


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (_cut, r"pairs\.reference\.bin has \d+ bytes, its manifest says \d+"),
    "a changed bit": (_flip, r"pairs\.reference\.bin is damaged"),
    "removed": (_remove, r"pairs\.reference\.bin is missing"),
    "a manifest cut short": (_cut_manifest, r"pairs\.reference\.json is not valid JSON"),
    "an edited manifest": (_edit_manifest, r"pairs\.reference\.json is damaged"),
    "the manifest of something else": (_another_manifest, r"pairs\.reference\.json is not a manifest of reference"),
    "a file outside": (_outside, r"which lies outside"),
    "of fewer tokens": (_fewer_tokens, r"pairs\.reference\.json are not of \d+ trained tokens"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_reference_is_named(folder: Path, converted: Path, what: str) -> None:
    damage, reason = DAMAGE[what]
    damage(folder)
    found = _refused(folder, converted)
    assert re.search(reason, found) and ("scripts/4_train.sh reference" in found or what == "a file outside"), found


def test_the_reference_command_makes_a_damaged_one_again(folder: Path, converted: Path) -> None:
    before = (folder / "pairs.reference.bin").read_bytes()
    common = ["--load", converted, "--data-path", folder / "pairs", "--save", folder / "none", "--global-batch-size", "8"]
    words = [*common, "--objective", "dpo", "--precision", "fp32"]
    assert "log-probabilities in" in tiny.launch(1, "train", "reference", *words)  # nothing to do
    _cut(folder)
    assert "replaced" in tiny.launch(1, "train", "reference", *words)
    assert (folder / "pairs.reference.bin").read_bytes() == before
    # And what was made in another layout, since its last digits differ.
    output = tiny.launch(2, "train", "reference", *words, "--tensor-model-parallel-size", "2")
    assert "was made with tensor_parallel 1, now 2" in re.sub(r"\s+", " ", output)


def test_objectives_and_data_that_do_not_go_together_are_named(
    folder: Path, converted: Path, packed_rows: Path, tmp_path: Path
) -> None:
    reason = _refused(folder, converted, "--data-path", packed_rows)
    assert f"OBJECTIVE=dpo needs pairs, and {packed_rows} has none: run scripts/3_tokenize.sh" in reason
    assert "would train the rejected answers too: take OBJECTIVE=dpo" in _refused(folder, converted, "--objective", "sft")
    reason = _refused(folder, converted, "--reference", tmp_path / "nowhere")
    assert f"REFERENCE: checkpoint folder {tmp_path / 'nowhere'} does not exist" in reason
    common = ["reference", "--load", converted, "--data-path", packed_rows, "--save", tmp_path / "run"]
    for objective in ("sft", "orpo"):
        with pytest.raises(UserError, match=f"OBJECTIVE={objective} takes no reference"):
            plan_run(*parse([str(word) for word in [*common, "--objective", objective]]), num_processes=1)


def test_a_reference_that_does_not_fit_the_data_or_the_layout_is_named(folder: Path, converted: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = {"small": {"vocab_size": 100}, "three heads": {"num_attention_heads": 3, "num_key_value_heads": 3}}
    for name, changes in kinds.items():
        config = Qwen2Config(**{**sizes, "num_hidden_layers": 2, "vocab_size": 131, "head_dim": 16, **changes})
        tiny.save_random(Qwen2ForCausalLM(config), folder / f"{name}_hf")
        tiny.run_module("convert", "--hf-dir", folder / f"{name}_hf", "--output", folder / name)
    elsewhere = ["--reference-logps", folder / "elsewhere", "--reference"]
    reason = _refused(folder, converted, *elsewhere, folder / "small")
    assert reason.startswith(f"REFERENCE {folder / 'small'}: token 130 in") and "vocabulary has 100" in reason
    common = ["train", "--load", converted, "--data-path", folder / "pairs", "--save", folder / "run", "--objective", "dpo"]
    common += ["--train-iters", "2", "--global-batch-size", "8", "--tensor-model-parallel-size", "2"]
    plan = plan_run(*parse([str(word) for word in [*common, *elsewhere, folder / "three heads"]]), num_processes=2)
    with pytest.raises(UserError, match=r"REFERENCE .*three heads: TP=2 does not divide the model's 3 attention heads"):
        input_checks.check(plan)


def test_resuming_refuses_another_objective_and_another_reference(folder: Path, converted: Path) -> None:
    common = ["--load", converted, "--data-path", folder / "pairs", "--save", folder / "run", "--global-batch-size", "8"]
    common += ["--precision", "fp32", "--objective", "dpo"]
    tiny.launch(1, "train", "train", *common, "--train-iters", "1")
    more = ["resume", *common, "--train-iters", "2"]
    elsewhere = ["--reference", folder / "other", "--reference-logps", folder / "elsewhere"]
    changes: dict[str, list[object]] = {
        "OBJECTIVE was dpo, DPO_LOSS=sigmoid, DPO_BETA=0.1.* RESUME_WITH=objective": ["--dpo-beta", "0.3"],
        "the reference's content was checksum .* RESUME_WITH=reference": elsewhere,
    }
    for reason, words in changes.items():
        plan = plan_run(*parse([str(word) for word in [*more, *words]]), num_processes=1)
        with pytest.raises(UserError, match=reason):
            check_same_run(plan.start, plan)
    output = tiny.launch(1, "train", *more, *elsewhere, "--resume-with", "reference,objective", "--dpo-beta", "0.3")
    assert "changed since iteration 1: OBJECTIVE from dpo" in output and (folder / "elsewhere.bin").exists()


def test_a_reference_and_its_model_that_are_both_gone_are_named(folder: Path, converted: Path) -> None:
    start = Path(shutil.copytree(converted, folder / "start"))
    logps = ["--reference-logps", folder / "logps"]
    common = ["--data-path", folder / "pairs", "--save", folder / "run", "--global-batch-size", "8", "--precision", "fp32"]
    common += ["--objective", "dpo", *logps]
    tiny.launch(1, "train", "train", *common, "--load", start, "--train-iters", "1")
    shutil.rmtree(start)
    more = ["resume", *common, "--train-iters", "2"]
    (folder / "kept.bin").write_bytes((folder / "logps.bin").read_bytes())
    # The numbers are enough.
    tiny.launch(1, "train", *more, "--load", start)
    data_file(folder / "logps", "json").unlink()
    output = tiny.launch(1, "train", "resume", *common, "--load", start, "--train-iters", "3", status=2)
    assert f"log-probabilities of {start}" in output and "are gone" in output and output.count("error: ") == 1
    # Another copy of the model is as good.
    tiny.launch(1, "train", "resume", *common, "--load", converted, "--train-iters", "3")
    assert np.array_equal(np.fromfile(folder / "logps.bin"), np.fromfile(folder / "kept.bin"))
