"""Hugging Face to Megatron and back: bit-equal, in both formats, with transformers' logits in between."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support import tiny, tiny_families


def _convert(model: Path, output: Path, tp: int, pp: int, form: str) -> Path:
    sizes = ["--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp]
    tiny.run_module("convert", "--source", model, "--output", output, *sizes, "--ckpt-format", form)
    return output


def test_both_formats_export_to_the_source_bit_for_bit(tiny_llama: Path, tmp_path: Path) -> None:
    model = tiny_llama
    for form, files in (
        ("torch_dist", {"iter_0000001/.metadata", "iter_0000001/manifest.json"}),
        ("torch", {f"iter_0000001/mp_rank_{tp:02d}_{pp:03d}/model_optim_rng.pt" for tp in (0, 1) for pp in (0, 1)}),
    ):
        checkpoint = _convert(model, tmp_path / form, 2, 2, form)
        there = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*")}
        assert {"latest_checkpointed_iteration.txt", *files} <= there
        tiny.run_module("export", "--load", checkpoint, "--hf-dir", model, "--output", tmp_path / f"{form}_export")
        tiny.assert_same_weights(tmp_path / f"{form}_export", model)
        exported = json.loads((tmp_path / f"{form}_export" / "config.json").read_text())
        assert exported == json.loads((model / "config.json").read_text())
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_an_extended_context_is_trained_and_goes_into_the_export(spelling: str, tmp_path: Path) -> None:
    model = tiny_families.save_family(tmp_path / "model", "qwen3_tied")
    config = json.loads((model / "config.json").read_text())
    if spelling == "rope_scaling":
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        (model / "config.json").write_text(json.dumps(config))
    options = ["--rope-scaling", "yarn", "--rope-factor", "4", "--rope-original", "40", "--verify", "1"]
    output = tiny.run_module("convert", "--source", model, "--output", tmp_path / "checkpoint", *options)
    assert "verified: logits as transformers'" in output
    output = tiny.run_module("convert", "--source", model, "--output", tmp_path / "checkpoint", *options)
    assert "nothing to do" in output
    tiny.run_module("compare_logits", "--load", tmp_path / "checkpoint", "--hf-dir", model)
    output = tiny.run_module("export", "--load", tmp_path / "checkpoint", "--hf-dir", model, "--output", tmp_path / "exported")
    assert "positions are extended as in the conversion, yarn by 4" in output
    exported = json.loads((tmp_path / "exported" / "config.json").read_text())
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}
    assert scaling.items() <= exported[spelling].items() and exported["max_position_embeddings"] == 160
    tiny.assert_same_weights(tmp_path / "exported", model)
    refused = ["--source", tmp_path / "exported", "--output", tmp_path / "again"]
    assert "has RoPE scaling of type 'yarn' already" in tiny.run_module("convert", *refused, *options, status=2)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "olmo3", "qwen3_5", "deepseek_v3_moe"])
def test_megatron_cores_own_loader_reads_a_converted_checkpoint(family: str, tmp_path: Path) -> None:
    """It finds every tensor under the name and in the shape that its model asks for, and gets the source's values."""
    from megatron.core import dist_checkpointing

    from megatron.sft import convert
    from megatron.sft.families.weight_names import weight_entries
    from megatron.sft.hf.folder import HFFolder
    from megatron.sft.hf.parameters import HFParameters
    from megatron.sft.model import process_groups
    from megatron.sft.model.config import transformer_config
    from megatron.sft.model.gpt import build_model
    from megatron.sft.model.layout import Layout
    from megatron.sft.model.live_weights import whole_weights

    source = HFFolder(tiny_families.save_family(tmp_path / "model", family))
    assert convert.main(["--source", str(source.path), "--output", str(tmp_path / "checkpoint")]) == 0
    architecture = source.architecture
    with process_groups.parallel(Layout()):
        model = build_model(architecture, Layout(), transformer_config(architecture, Layout()))
        state = {name: part for name, part in model.sharded_state_dict().items() if not name.endswith("_extra_state")}
        loaded = dist_checkpointing.load(state, str(tmp_path / "checkpoint" / "iter_0000001"))
        model.load_state_dict(loaded, strict=False)
        # Experts are parts of one parameter, whose memory has been filled.
        whole = whole_weights(model, architecture)
    original = HFParameters(source, None)
    for entry in weight_entries(architecture):
        assert torch.equal(whole[entry.megatron], original.read(entry)), entry.megatron


def test_a_torch_checkpoint_is_what_megatron_lm_checks(tiny_qwen2_tied: Path, tmp_path: Path) -> None:
    """The names, the arguments and the local shapes that classic Megatron-LM's loader reads."""
    import argparse

    checkpoint = _convert(tiny_qwen2_tied, tmp_path / "checkpoint", 2, 1, "torch")
    with torch.serialization.safe_globals([argparse.Namespace]):
        path = checkpoint / "iter_0000001" / "mp_rank_01" / "model_optim_rng.pt"
        content = torch.load(path, weights_only=True)
    arguments = content["args"]
    assert content["checkpoint_version"] == 3.0 and content["iteration"] == 1
    assert (arguments.num_layers, arguments.hidden_size, arguments.num_attention_heads) == (3, 64, 4)
    assert (arguments.num_query_groups, arguments.ffn_hidden_size, arguments.padded_vocab_size) == (2, 96, 132)
    assert arguments.add_qkv_bias and not arguments.untie_embeddings_and_output_weights
    assert (arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size) == (2, 1)
    state = content["model"]
    assert state["embedding.word_embeddings.weight"].shape == (66, 64)
    assert state["decoder.layers.2.self_attention.linear_qkv.weight"].shape == (64, 64)
    assert state["decoder.layers.2.self_attention.linear_qkv.layer_norm_weight"].shape == (64,)
    assert state["decoder.layers.0.mlp.linear_fc1.weight"].shape == (96, 64)
    assert state["decoder.layers.0.mlp.linear_fc1._extra_state"] is None
    assert "output_layer.weight" not in state


def test_training_starts_from_a_torch_checkpoint_of_any_layout(
    tiny_qwen2: Path, packed_rows: Path, converted: Path, tmp_path: Path
) -> None:
    checkpoint = _convert(tiny_qwen2, tmp_path / "checkpoint", 2, 1, "torch")
    options = ["--data-path", packed_rows, "--precision", "fp32", "--train-iters", "2", "--global-batch-size", "8"]
    sizes = ["--tensor-model-parallel-size", "2"]
    tiny.launch(2, "train", "train", "--load", checkpoint, "--save", tmp_path / "a", *options, *sizes)
    tiny.launch(2, "train", "train", "--load", converted, "--save", tmp_path / "b", *options, *sizes)
    assert tiny.losses(tmp_path / "a") == tiny.losses(tmp_path / "b")
    # Whole parameters are read of it, so another layout does as well.
    tiny.run_module("train", "train", "--load", checkpoint, "--save", tmp_path / "c", *options)
    assert tiny.losses(tmp_path / "c") == pytest.approx(tiny.losses(tmp_path / "a"), rel=1e-6)


def test_converting_again_says_that_it_is_done_and_refuses_another_source(
    tiny_qwen2: Path, tiny_qwen2_tied: Path, converted: Path
) -> None:
    output = tiny.run_module("convert", "--hf-dir", tiny_qwen2, "--output", converted)
    assert "is already the conversion of" in output
    output = tiny.run_module("convert", "--hf-dir", tiny_qwen2_tied, "--output", converted, status=2)
    assert output.startswith(f"error: {converted} holds a checkpoint of another source") and output.count("\n") == 1


def test_a_hundred_damages_give_a_hundred_errors_and_leave_nothing(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Weights, headers, indices, configurations, trackers, manifests, and pickles that would run code."""
    output = tiny.run_script(tiny.ROOT / "tests" / "support" / "damaged_inputs.py", tiny_qwen2, tmp_path)
    lines = output.splitlines()
    assert lines[-1] == "done"
    assert sum(line.startswith("refused ") for line in lines) >= 100
    assert sum(line.startswith("accepted ") for line in lines) <= 3, output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sharded", "torch", "torch_dist"]


def test_a_damaged_model_folder_gives_one_line(tiny_qwen2: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_qwen2, model)
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000])
    output = tiny.run_module("convert", "--source", model, "--output", tmp_path / "out", status=2)
    assert output.startswith("error: ") and output.count("\n") == 1 and "is damaged" in output
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_export_refuses_a_damaged_checkpoint_and_a_full_folder(
    converted: Path, tiny_qwen2: Path, tiny_qwen2_tied: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(converted, broken)
    data = next((broken / "iter_0000001").glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    common = ["--hf-dir", tiny_qwen2, "--output", tmp_path / "out"]
    assert f"{data} is damaged" in tiny.run_module("export", "--load", broken, *common, status=2)
    wrong = ["--hf-dir", tiny_qwen2_tied, "--output", tmp_path / "out"]
    assert "has tied_embeddings True" in tiny.run_module("export", "--load", converted, *wrong, status=2)
    assert "has no checkpoint of iteration 7: there are [1]" in tiny.run_module(
        "export", "--load", converted, *common, "--iteration", "7", status=2
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    assert "exists and is not empty" in tiny.run_module("export", "--load", converted, *common, status=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "out"]
