"""Mixtures of experts: what their routers, shared experts and files have that other models have not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import tiny, tiny_families

OPTIONS = ["--lr", "1e-3", "--min-lr", "1e-3", "--lr-decay-style", "constant", "--global-batch-size", "8"]


@pytest.mark.parametrize("family", ["glm4_moe_bf16", "ernie4_5_moe"])
def test_a_correction_bias_stays_as_pretrained_while_the_model_trains_and_resumes_in_other_layouts(
    family: str, packed_rows: Path, tmp_path: Path
) -> None:
    model = tiny_families.save_family(tmp_path / "model", family)
    tiny.run_module("convert", "--source", model, "--output", tmp_path / "checkpoint", "--dtype", "bf16")
    options = ["--load", tmp_path / "checkpoint", "--data-path", packed_rows, *OPTIONS]
    fp32 = [*options, "--precision", "fp32"]
    tiny.launch(1, "train", "train", *fp32, "--save", tmp_path / "one", "--train-iters", "4")
    spread = [*fp32, "--save", tmp_path / "spread", "--expert-model-parallel-size", "2"]
    tiny.launch(2, "train", "train", *spread, "--train-iters", "2", "--recompute", "full")
    tiny.launch(2, "train", "resume", *spread, "--train-iters", "4", "--tensor-model-parallel-size", "2")
    assert tiny.losses(tmp_path / "spread") == pytest.approx(tiny.losses(tmp_path / "one"), rel=1e-5)
    tiny.launch(1, "train", "train", *options, "--save", tmp_path / "bf16", "--train-iters", "1", "--precision", "bf16")
    before = load_file(model / "model.safetensors")
    for run in ("spread", "bf16"):
        folder = tmp_path / f"{run}-export"
        tiny.run_module("export", "--load", tmp_path / run, "--hf-dir", model, "--output", folder, "--dtype", "bf16")
        after = load_file(folder / "model.safetensors")
        assert before.keys() == after.keys()
        biases = [name for name in before if name.endswith("e_score_correction_bias")]
        assert biases and all(after[name].dtype == torch.float32 for name in biases)
        assert all(torch.equal(before[name], after[name]) for name in biases)
        # Whose values 16 bits cannot hold.
        assert any(not torch.equal(before[name], before[name].bfloat16().float()) for name in biases)
        assert all(after[name].dtype == torch.bfloat16 for name in before.keys() - set(biases))
        assert not torch.equal(before["model.layers.1.mlp.gate.weight"].bfloat16(), after["model.layers.1.mlp.gate.weight"])


def in_mxfp4(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of gpt-oss as random 4-bit numbers with a scale for 32 of them."""
    result = {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if tensor.dim() == 3:
            experts, inputs, outputs = tensor.shape
            blocks = (experts, outputs, inputs // 32, 16)
            result[f"{name}_blocks"] = torch.randint(0, 256, blocks, dtype=torch.uint8, generator=generator)
            result[f"{name}_scales"] = torch.randint(118, 124, blocks[:3], dtype=torch.uint8, generator=generator)
        else:
            result[name] = tensor
    return result


def test_experts_in_mxfp4_are_read_as_transformers_reads_them_and_exported_in_bfloat16(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = tiny_families.save_family(tmp_path / "model", "gpt_oss")
    path = model / "model.safetensors"
    packed = in_mxfp4({name: tensor.bfloat16() for name, tensor in load_file(path).items()})
    save_file(packed, path, metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {"dtype": "bfloat16"}
    entry = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (model / "config.json").write_text(json.dumps(config))
    options = ["--source", model, "--output", tmp_path / "checkpoint"]
    assert "weights are in MXFP4, config.json does not say so" in tiny.run_module("convert", *options, status=2)
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
    assert "10 tensors of experts are in MXFP4" in tiny.run_module("convert", *options)
    tiny.run_module("export", "--load", tmp_path / "checkpoint", "--hf-dir", model, "--output", tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text()) == config
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    expected = {name: tensor for name, tensor in packed.items() if not name.endswith(("_blocks", "_scales"))}
    for name in (name.removesuffix("_blocks") for name in packed if name.endswith("_blocks")):
        expected[name] = convert_moe_packed_tensors(packed[f"{name}_blocks"], packed[f"{name}_scales"])
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        assert exported[name].dtype == torch.bfloat16 and torch.equal(exported[name], tensor), name
    del packed[next(name for name in packed if name.endswith("_scales"))]
    save_file(packed, path, metadata={"format": "pt"})
    again = ["--source", model, "--output", tmp_path / "again"]
    assert "down_proj_scales: download the model again" in tiny.run_module("convert", *again, status=2)


def test_layers_that_predict_further_tokens_and_adapters_next_to_experts(packed_rows: Path, tmp_path: Path) -> None:
    """GLM's file has another layer after the last one; PEFT puts adapters on shared experts and dense layers, as here."""
    model = tiny_families.save_family(tmp_path / "model", "glm4_moe_bf16")
    path = model / "model.safetensors"
    further = {"model.layers.5.eh_proj.weight": torch.randn(64, 128), "model.layers.5.enorm.weight": torch.randn(64)}
    save_file({**load_file(path), **further}, path, metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    said = tiny.run_module("convert", "--source", model, "--output", tmp_path / "checkpoint")
    assert "2 tensors of model.layers.5 are kept for the export, not trained" in said
    options = ["--load", tmp_path / "checkpoint", "--data-path", packed_rows, "--precision", "fp32", *OPTIONS]
    start = ["--lora-rank", "4", "--train-iters", "2", "--save", tmp_path / "run", "--expert-model-parallel-size", "2"]
    tiny.launch(2, "train", "train", *options, *start)
    export = ["export", "--load", tmp_path / "run", "--hf-dir", model, "--output"]
    said = tiny.run_module(*export, tmp_path / "merged", "--merge", "--verify", "1", "--dtype", "fp32")
    assert "verified: logits as of the adapter" in said
    before, after = load_file(path), load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if ".mlp." in name} == {
        name for name in before if ".mlp." in name and ".experts." not in name and "gate." not in name and ".5." not in name
    }
    for target in ("gate", "shared_expert_gate"):
        refused = ["--lora-targets", target, "--lora-rank", "4", "--train-iters", "2", "--save", tmp_path / target]
        assert f"has no '{target}'" in tiny.launch(1, "train", "train", *options, *refused, status=2)
    gpt_oss = tiny_families.save_family(tmp_path / "gpt_oss", "gpt_oss")
    tiny.run_module("convert", "--source", gpt_oss, "--output", tmp_path / "other")
    refused = ["--load", tmp_path / "other", "--data-path", packed_rows, *OPTIONS, "--lora-targets", "all,experts"]
    refused += ["--lora-rank", "4", "--train-iters", "2", "--save", tmp_path / "refused"]
    assert "gpt_oss has no 'experts' that adapters are built for" in tiny.launch(1, "train", "train", *refused, status=2)


@pytest.mark.parametrize("sizes", ["1 1 1 0", "2 2 1 1", "2 1 1 0"], ids=lambda sizes: f"TP, CP, EP, SP {sizes}")
def test_the_loss_of_unevenly_loaded_experts_is_that_of_transformers_without_padding(sizes: str, tmp_path: Path) -> None:
    """Its value, its gradients, and the tokens of the most loaded expert, on a part of the tokens in each process."""
    model = tiny_families.save_family(tmp_path / "model", "olmoe")
    tp, cp, *_ = map(int, sizes.split())
    worker = tiny.ROOT / "tests" / "support" / "balance_worker.py"
    output = tiny.launch_test_worker(tp * cp, worker, *sizes.split(), model / "config.json")
    assert output.count("equal") == tp * cp


def transformers_balance(model: Path, rows: list[list[tiny.Conversation]]) -> float:
    """The mean over layers and rows of transformers' loss."""
    from transformers import AutoModelForCausalLM
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    losses = []
    for row in rows:
        parts = [torch.cat([torch.from_numpy(part) for part in conversation])[None] for conversation in row]
        with torch.no_grad():
            logits = [theirs(ids, output_router_logits=True).router_logits for ids in parts]
        for layer in zip(*logits, strict=True):
            losses.append(
                load_balancing_loss_func((torch.cat(layer),), theirs.config.num_experts, theirs.config.num_experts_per_tok)
            )
    return float(torch.stack(losses).mean())


def test_load_and_its_loss_are_the_same_in_every_layout_and_with_gradients_of_several_micro_batches(tmp_path: Path) -> None:
    model = tiny_families.save_family(tmp_path / "model", "olmoe")
    rows = tiny.random_rows(4, 96)
    data = tiny.write_rows(tmp_path / "data", rows, 96)
    tiny.run_module("convert", "--source", model, "--output", tmp_path / "checkpoint")
    options = ["--load", tmp_path / "checkpoint", "--data-path", data, "--precision", "fp32", *OPTIONS[:-1], "4"]
    options += ["--train-iters", "3", "--moe-aux-loss", "0.5", "--clip-grad", "0", "--lr-warmup-iters", "0"]
    size = "-model-parallel-size"
    layouts: dict[str, tuple[int, list[str]]] = {
        "one": (1, []),
        "recomputed, PP2": (2, [f"--pipeline{size}", "2", "--recompute", "full"]),
        "EP2 x TP2": (2, [f"--tensor{size}", "2", f"--expert{size}", "2"]),
        "CP2 x DP2": (4, ["--context-parallel-size", "2", "--recompute", "selective"]),
    }
    found = {}
    for name, (processes, sizes) in layouts.items():
        said = tiny.launch(processes, "train", "train", *options, *sizes, "--save", tmp_path / name)
        assert "most loaded expert" in said and "balance" in said
        fields = ("loss", "grad_norm", "expert_load", "expert_load_worst", "moe_aux_loss")
        found[name] = [[line[field] for field in fields] for line in tiny.metrics(tmp_path / name) if "loss" in line]
        for ours, one in zip(found[name], found["one"], strict=True):
            assert ours == pytest.approx(one, rel=2e-5), name
    assert found["one"][0][-1] == pytest.approx(transformers_balance(model, rows), rel=1e-5)
    plain = [*options, "--moe-aux-loss", "0", "--save", tmp_path / "plain"]
    tiny.launch(1, "train", "train", *plain)
    without = tiny.metrics(tmp_path / "plain")
    assert "moe_aux_loss" not in without[0] and without[0]["expert_load"] == found["one"][0][2]
    assert without[0]["grad_norm"] != pytest.approx(found["one"][0][1], rel=1e-3)
