"""From checkpoint to checkpoint: other layouts, formats and precisions, and the trees that other projects wrote."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.sft.runtime.manifest import sealed
from tests.support import tiny

TP, PP = 2, 2
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 64, 4, 2, 16, 96, 3


class ModelType:
    """Stands for an enumeration of Megatron-LM's, which is pickled into its arguments."""


def _save_as_megatron_lm(hf: dict[str, torch.Tensor], root: Path, padded_rows: int, fused: bool) -> Path:
    """The tree that Megatron-LM's checkpoint tool writes for a Qwen2 at TP 2 PP 2: layers 2 and 1, every rank its slices.

    Written out here by hand: query heads of a group, its key, its value; the halves of gate and up; rows and columns.
    """
    (root / "iter_0000001").mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("1")
    arguments = argparse.Namespace(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, group_query_attention=True, num_query_groups=KV_HEADS
    )
    arguments.rotary_base, arguments.norm_epsilon, arguments.model_type = 10000, 1e-6, ModelType()
    for tp in range(TP):
        for pp, layers in enumerate(((0, 1), (2,))):
            state: dict[str, Any] = {}
            if pp == 0:
                state["embedding.word_embeddings.weight"] = _rows(hf["model.embed_tokens.weight"], padded_rows, tp)
            else:
                state["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
                state["output_layer.weight"] = _rows(hf["lm_head.weight"], padded_rows, tp)
            for local, layer in enumerate(layers):
                state.update(_layer(hf, layer, f"decoder.layers.{local}.", tp, fused))
            folder = root / "iter_0000001" / f"mp_rank_{tp:02d}_{pp:03d}"
            folder.mkdir()
            content = {"args": arguments, "checkpoint_version": 3.0, "iteration": 1, "model": state}
            content["rng_state"] = [
                {"random_rng_state": (3, (1, 2), None), "cuda_rng_state": torch.zeros(4, dtype=torch.uint8)}
            ]
            content["optimizer"] = {"state": {}, "param_groups": []}
            torch.save(content, folder / "model_optim_rng.pt")
    return root


def _rows(rows: torch.Tensor, padded_rows: int, tp: int) -> torch.Tensor:
    if len(rows) < padded_rows:  # the tool repeats the last row
        rows = torch.cat([rows, rows[-1:].expand(padded_rows - len(rows), -1)])
    return rows[:padded_rows].chunk(TP)[tp].clone()


def _layer(hf: dict[str, torch.Tensor], layer: int, name: str, tp: int, fused: bool) -> dict[str, Any]:
    theirs = f"model.layers.{layer}."
    qkv: dict[str, torch.Tensor] = {}
    for kind in ("weight", "bias"):
        q, k, v = (hf[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv")
        # One KV head and two query heads a rank.
        heads = [q[tp * 32 : tp * 32 + 32], k[tp * 16 : tp * 16 + 16], v[tp * 16 : tp * 16 + 16]]
        qkv[kind] = torch.cat(heads)
    half = slice(tp * FFN // 2, (tp + 1) * FFN // 2)
    gate, up = hf[f"{theirs}mlp.gate_proj.weight"][half], hf[f"{theirs}mlp.up_proj.weight"][half]
    norms = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
    if not fused:
        norms = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
    return {
        f"{name}{norms[0]}": hf[f"{theirs}input_layernorm.weight"],
        f"{name}self_attention.linear_qkv.weight": qkv["weight"],
        f"{name}self_attention.linear_qkv.bias": qkv["bias"],
        f"{name}self_attention.linear_qkv._extra_state": None,
        f"{name}self_attention.linear_proj.weight": hf[f"{theirs}self_attn.o_proj.weight"].chunk(TP, 1)[tp].clone(),
        f"{name}{norms[1]}": hf[f"{theirs}post_attention_layernorm.weight"],
        f"{name}mlp.linear_fc1.weight": torch.cat([gate, up]),
        f"{name}mlp.linear_fc2.weight": hf[f"{theirs}mlp.down_proj.weight"].chunk(TP, 1)[tp].clone(),
    }


@pytest.mark.parametrize(("padded_rows", "fused"), [(256, True), (120, False)])
def test_the_tree_of_megatron_lm_is_read(tiny_qwen2: Path, tmp_path: Path, padded_rows: int, fused: bool) -> None:
    """With more rows than the model, which are cut, and with fewer, which the original gives and which is said."""
    hf: dict[str, Any] = tiny.tensors(tiny_qwen2)
    tree = _save_as_megatron_lm(hf, tmp_path / "theirs", padded_rows, fused)
    output = tiny.run_module("export", "--load", tree, "--hf-dir", tiny_qwen2, "--output", tmp_path / "hf")
    assert ("the last 11 rows of embedding.word_embeddings.weight, which the checkpoint lacks" in output) == (not fused)
    tiny.assert_same_weights(tmp_path / "hf", tiny_qwen2)
    if fused:
        output = tiny.run_module("convert", "--source", tree, "--output", tmp_path / "ours", status=2)
        assert "has no manifest.json with the model's configuration: give the folder of the original model" in output
        tiny.run_module("convert", "--source", tree, "--hf-dir", tiny_qwen2, "--output", tmp_path / "ours")
        tiny.run_module("export", "--load", tmp_path / "ours", "--hf-dir", tiny_qwen2, "--output", tmp_path / "again")
        tiny.assert_same_weights(tmp_path / "again", tiny_qwen2)


def test_arguments_that_contradict_the_configuration_are_reported(tiny_qwen2: Path, tmp_path: Path) -> None:
    tree = _save_as_megatron_lm(tiny.tensors(tiny_qwen2), tmp_path / "theirs", 132, True)  # type: ignore[arg-type]
    model = tmp_path / "model"
    shutil.copytree(tiny_qwen2, model)
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1e6
    (model / "config.json").write_text(json.dumps(config))
    output = tiny.run_module("export", "--load", tree, "--hf-dir", model, "--output", tmp_path / "hf")
    assert "the checkpoint was trained with rotary_base 10000, config.json says 1000000.0" in output


@pytest.fixture(scope="module")
def run_folder(tiny_qwen2: Path, packed_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of training in bfloat16, with data whose answers end with token 7."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.run_module("convert", "--source", tiny_qwen2, "--output", folder / "start")
    data = folder / "rows"
    for ending in (".bin", ".idx", ".json"):
        shutil.copyfile(f"{packed_rows}{ending}", f"{data}{ending}")
    manifest = json.loads(Path(f"{data}.json").read_text())
    manifest |= {"tokenizer": {"end_of_turn_ids": [7]}, "chat_template": "{{ messages[0]['content'] }}"}
    Path(f"{data}.json").write_text(json.dumps(sealed(manifest)))
    options = ["--data-path", data, "--train-iters", "3", "--global-batch-size", "8", "--lr", "1e-3"]
    tiny.run_module("train", "train", "--load", folder / "start", "--save", folder / "run", *options)
    return folder / "run"


def test_a_training_checkpoint_changes_format_and_layout(tiny_qwen2: Path, run_folder: Path, tmp_path: Path) -> None:
    sizes = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "3"]
    tiny.run_module("convert", "--source", run_folder, "--output", tmp_path / "a", "--ckpt-format", "torch", *sizes)
    assert len(list((tmp_path / "a" / "iter_0000003").glob("mp_rank_*"))) == 6
    tiny.run_module("convert", "--source", tmp_path / "a", "--output", tmp_path / "b")
    for checkpoint, name in ((run_folder, "x"), (tmp_path / "b", "y")):
        tiny.run_module("export", "--load", checkpoint, "--hf-dir", tiny_qwen2, "--output", tmp_path / name)
    tiny.assert_same_weights(tmp_path / "x", tmp_path / "y")
    tiny.run_module("convert", "--source", run_folder, "--output", tmp_path / "c", "--with-optimizer")
    manifest = json.loads((tmp_path / "c" / "iter_0000003" / "manifest.json").read_text())
    assert manifest["training"]["consumed_rows"] == 24
    output = tiny.run_module(
        "convert", "--source", run_folder, "--output", tmp_path / "d", "--with-optimizer", "--ckpt-format", "torch", status=2
    )
    assert "the optimizer's state is kept from torch_dist to torch_dist only" in output and not (tmp_path / "d").exists()


def test_a_trained_export_tells_what_it_is(tiny_qwen2: Path, run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "loss.png").write_bytes(b"a picture")
    output = tiny.run_module("export", "--load", run_folder, "--hf-dir", tiny_qwen2, "--output", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    for text in ("fine-tuned", "rows: 64", "steps: 3 of 3", "loss at the last step: ", "| lr | 0.001 |", "![loss](loss.png)"):
        assert text in card, card
    assert (tmp_path / "hf" / "loss.png").read_bytes() == b"a picture"
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == 7
    assert "generation also stops at token 7, as trained" in output


def test_another_precision_is_counted(tiny_qwen2: Path, tmp_path: Path) -> None:
    out = [tmp_path / name for name in ("half", "hf", "single", "wide")]
    output = tiny.run_module("convert", "--source", tiny_qwen2, "--output", out[0], "--dtype", "bf16")
    values = sum(t.numel() for t in tiny.tensors(tiny_qwen2).values())  # type: ignore[attr-defined]
    assert f"of {values:,} values rounded (which is usual), 0 overflow" in output and "cast float32 to bfloat16" in output
    tiny.run_module("export", "--load", out[0], "--hf-dir", tiny_qwen2, "--output", out[1])
    assert json.loads((out[1] / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in tiny.tensors(out[1]).items():
        expected = tiny.tensors(tiny_qwen2)[name].to(torch.bfloat16)  # type: ignore[attr-defined]
        assert torch.equal(tensor, expected), name  # type: ignore[arg-type]
    output = tiny.run_module("export", "--load", out[0], "--hf-dir", tiny_qwen2, "--output", out[3], "--dtype", "fp32")
    assert "cast bfloat16 to float32: 0 of" in output
    assert {t.dtype for t in tiny.tensors(out[3]).values()} == {torch.float32}  # type: ignore[attr-defined]
