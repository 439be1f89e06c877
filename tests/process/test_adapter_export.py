"""Adapters leave as PEFT reads them: a folder with equal logits, a model as of merge_and_unload, bit-equal round trips."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import peft_oracle, tiny, tiny_families
from tests.support.material import transformers_4_folder

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(3, 90)[None]


class Exported:
    """An adapter of PEFT, continued for one step with a learning rate (0: the adapter as it was), and exported twice."""

    def __init__(self, folder: Path, family: str, rate: str, precision: str = "fp32", **config: Any) -> None:
        self.model = tiny_families.save_family(folder / "hf", family)
        self.adapter = peft_oracle.save_adapter(self.model, folder / "adapter", **config)
        tiny.run_module("convert", "--source", self.model, "--output", folder / "mcore")
        data = tiny.write_rows(folder / "data", tiny.random_rows(4, 96), 96)
        self.run, self.out, self.merged = folder / "run", folder / "out", folder / "merged"
        settings = ["--lora-init-from", self.adapter, "--train-iters", "1", "--lr-warmup-iters", "0", "--weight-decay", "0"]
        given = ["--load", folder / "mcore", "--data-path", data, "--save", self.run, *settings]
        options = ["--precision", precision, "--lr", rate, "--min-lr", "0", "--global-batch-size", "4"]
        tiny.launch(1, "train", "train", *given, *options, "--lr-decay-style", "constant")
        both = ["--load", self.run, "--hf-dir", self.model, "--output"]
        tiny.run_module("export", *both, self.out)
        self.merging = tiny.run_module("export", *both, self.merged, "--merge", "--verify", "1")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    made: dict[str, Exported] = {}

    def make(family: str, rate: str = "1e-3", **config: Any) -> Exported:
        key = f"{family} {rate} {config}"
        if key not in made:
            made[key] = Exported(tmp_path_factory.mktemp("export"), family, rate, **config)
        return made[key]

    return make


def peft_model(exported: Exported) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(exported.model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, exported.out).eval()


def test_import_without_a_step_and_export_are_bit_equal(exported: Callable[..., Exported]) -> None:
    for precision in ("fp32", "bf16"):
        case = exported("qwen2", rate="0", precision=precision, target_modules=TARGETS)
        tiny.assert_same_weights(case.adapter, case.out)


LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


@pytest.mark.parametrize("family", ["qwen2", "llama32_tied", "deepseek_v3_moe"])
def test_the_merged_model_is_that_of_peft_bit_for_bit(exported: Callable[..., Exported], family: str) -> None:
    from transformers import AutoModelForCausalLM

    case = exported(family, target_modules=LATENT if "deepseek" in family else TARGETS)
    assert "verified: logits as of the adapter" in case.merging
    adapted = peft_model(case)
    with torch.no_grad():
        before = adapted(input_ids=IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(case.merged, dtype=torch.float32).eval()
        assert (merged(input_ids=IDS).logits - before).abs().max() <= 1e-5 * before.abs().max()
    theirs = adapted.merge_and_unload().state_dict()
    ours = merged.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert tiny.tensors(case.out).keys() == tiny.tensors(case.adapter).keys()


def test_the_folder_says_what_peft_needs(exported: Callable[..., Exported]) -> None:
    case = exported("qwen2", target_modules=["q_proj", "v_proj"], use_rslora=True, rank=8)
    config = json.loads((case.out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 16, True)
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["base_model_name_or_path"] == str(case.model)
    assert not (case.out / "config.json").exists()
    card = (case.out / "README.md").read_text()
    assert "library_name: peft" in card and "LoRA" in card


def test_a_bfloat16_model_is_merged_in_float32_and_rounded_once(exported: Callable[..., Exported]) -> None:
    case = exported("qwen2_tied_bf16", precision="bf16", target_modules=TARGETS)
    factors, base, merged = (tiny.tensors(folder) for folder in (case.out, case.model, case.merged))
    for module in ("self_attn.q_proj", "mlp.down_proj"):
        name = f"model.layers.1.{module}"
        down, up = (factors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        exact = base[f"{name}.weight"].float() + (up @ down) * 2.0  # type: ignore[attr-defined,operator]
        assert torch.equal(merged[f"{name}.weight"], exact.to(torch.bfloat16))  # type: ignore[arg-type]
    assert "rounding changed their effect by" in case.merging


LOGITS = """
import sys, json, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model, adapter, merged, ids = *sys.argv[1:4], torch.arange(3, 90)[None]
with torch.no_grad():
    whole = AutoModelForCausalLM.from_pretrained(merged, torch_dtype=torch.float32).eval()(ids).logits
    base = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32).eval()
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, adapter).eval()(input_ids=ids).logits
print(json.dumps([float((adapted - whole).abs().max()), float((adapted - plain).abs().max())]))
"""


def test_adapters_of_experts_are_read_by_transformers_4_and_5(tmp_path: Path) -> None:
    """Where each projection of an expert is a module, and where all experts are one tensor, which PEFT converts them to."""
    model = tiny_families.save_family(tmp_path / "hf", "qwen3_moe")
    tiny.run_module("convert", "--source", model, "--output", tmp_path / "mcore")
    data = tiny.write_rows(tmp_path / "data", tiny.random_rows(8, 96), 96)
    given = ["--load", tmp_path / "mcore", "--data-path", data, "--save", tmp_path / "run", "--precision", "fp32"]
    settings = ["--lora-rank", "4", "--lora-targets", "all,experts", "--lr", "3e-2", "--min-lr", "0", "--lr-warmup-iters", "0"]
    tiny.launch(1, "train", "train", *given, *settings, "--global-batch-size", "4", "--train-iters", "3")
    both = ["--load", tmp_path / "run", "--hf-dir", model, "--output"]
    tiny.run_module("export", *both, tmp_path / "out")
    tiny.run_module("export", *both, tmp_path / "merged", "--merge", "--verify", "0")
    for path in (model, tmp_path / "merged"):  # transformers 4's name of what transformers 5 writes
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "num_experts": config["num_local_experts"]}))
    for overlay in ("", str(transformers_4_folder())):
        command = [sys.executable, "-c", LOGITS, str(model), str(tmp_path / "out"), str(tmp_path / "merged")]
        environment = {**os.environ, "PYTHONPATH": overlay, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        difference, effect = json.loads(result.stdout.splitlines()[-1])
        assert difference <= 1e-5 * max(effect, 1.0) and effect > 0.1, overlay
