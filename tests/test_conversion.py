"""Hugging Face to Megatron and back: bit-equal, in both formats, with transformers' logits in between."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron.sft.errors import UserError
from megatron.sft.families import FAMILIES, read_shape, rules_of
from megatron.sft.families.rules import Shape
from megatron.sft.hf_folder import write_weights
from megatron.sft.layout import Layout, check_layout
from tests import tiny


@pytest.fixture(params=["tiny_qwen2", "tiny_qwen2_tied", "tiny_llama"])
def model(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


def _convert(model: Path, output: Path, tp: int, pp: int, form: str) -> Path:
    sizes = ["--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp]
    tiny.run_module("convert", "--hf-dir", model, "--output", output, *sizes, "--ckpt-format", form)
    return output


def test_both_formats_export_to_the_source_bit_for_bit(model: Path, tmp_path: Path) -> None:
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


def test_logits_are_those_of_transformers_in_every_layout(model: Path, tmp_path: Path) -> None:
    """TP 2 pads the odd vocabulary; PP 2 and 3 split the layers unevenly, tied embeddings lie on both ends."""
    checkpoint = _convert(model, tmp_path / "checkpoint", 1, 1, "torch_dist")
    compare = ["--load", checkpoint, "--hf-dir", model, "--tolerance", "1e-4"]
    for tp, pp, more in ((1, 1, []), (2, 2, []), (1, 3, []), (2, 1, ["--sequence-parallel"])):
        sizes = ["--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp]
        output = tiny.launch(tp * pp, "compare_logits", *compare, *sizes, *more)
        assert "largest difference of logits" in output


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


def test_training_starts_from_a_torch_checkpoint_in_its_layout(
    tiny_qwen2: Path, packed_rows: Path, converted: Path, tmp_path: Path
) -> None:
    checkpoint = _convert(tiny_qwen2, tmp_path / "checkpoint", 2, 1, "torch")
    options = ["--data-path", packed_rows, "--precision", "fp32", "--train-iters", "2", "--global-batch-size", "8"]
    sizes = ["--tensor-model-parallel-size", "2"]
    tiny.launch(2, "train", "train", "--load", checkpoint, "--save", tmp_path / "a", *options, *sizes)
    tiny.launch(2, "train", "train", "--load", converted, "--save", tmp_path / "b", *options, *sizes)
    assert tiny.losses(tmp_path / "a") == tiny.losses(tmp_path / "b")
    output = tiny.run_module("train", "train", "--load", checkpoint, "--save", tmp_path / "c", *options, status=2)
    assert "was written at TP 2 PP 1 in the torch format, this run has TP 1 PP 1" in output


def test_converting_again_says_that_it_is_done_and_refuses_another_source(
    tiny_qwen2: Path, tiny_qwen2_tied: Path, converted: Path
) -> None:
    output = tiny.run_module("convert", "--hf-dir", tiny_qwen2, "--output", converted)
    assert "is already the conversion of" in output
    output = tiny.run_module("convert", "--hf-dir", tiny_qwen2_tied, "--output", converted, status=2)
    assert output.startswith(f"error: {converted} holds another checkpoint") and output.count("\n") == 1


def test_every_family_reads_its_table_both_ways() -> None:
    config = {"num_hidden_layers": 1, "hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 6}
    config |= {"num_key_value_heads": 2, "vocab_size": 7, "max_position_embeddings": 8, "rms_norm_eps": 1e-6}
    for family in FAMILIES:
        shape = read_shape({**config, "model_type": family, "tie_word_embeddings": False}, "config.json")
        for rule in rules_of(shape):
            tensors = [torch.randn(_hf_shape(name, shape)) for name in rule.hf]
            back = rule.to_hf(shape, rule.to_megatron(shape, *tensors))
            assert all(torch.equal(one, other) for one, other in zip(tensors, back, strict=True)), rule.megatron


def _hf_shape(name: str, shape: Shape) -> tuple[int, ...]:
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    rows = {"q_proj": query, "k_proj": key, "v_proj": key, "gate_proj": ffn, "up_proj": ffn}
    for part, size in rows.items():
        if part in name:
            return (size,) if name.endswith("bias") else (size, hidden)
    return (hidden,) if "norm" in name else (hidden, hidden)


CONFIG = {
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
}
REFUSED = {
    "model_type 'gpt2' is not supported: choose one of llama, qwen2": {"model_type": "gpt2"},
    "model_type None is not supported": {"model_type": None},
    "hidden_act='gelu' is not supported for qwen2 (only 'silu')": {"hidden_act": "gelu"},
    "use_sliding_window=True is not supported": {"use_sliding_window": True},
    "RoPE scaling of type 'yarn' is not supported": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "RoPE scaling of type 'linear' is not supported": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "attention_bias=True is not supported for llama": {"model_type": "llama", "attention_bias": True},
    "dtype 'float64' is not supported": {"dtype": "float64"},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_built_is_refused_by_name(reason: str) -> None:
    with pytest.raises(UserError) as error:
        read_shape({**CONFIG, **REFUSED[reason]}, "model/config.json")
    assert str(error.value).startswith("model/config.json: ") and reason in str(error.value)


def test_old_and_new_spellings_of_a_configuration_are_read_alike() -> None:
    old = read_shape({**CONFIG, "rope_theta": 1e6, "torch_dtype": "bfloat16"}, "")
    new = read_shape(
        {**CONFIG, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "dtype": "bfloat16"}, ""
    )
    assert old == new and old.rope_theta == 1e6 and old.torch_dtype == torch.bfloat16


def test_uneven_pipelines_hold_every_layer() -> None:
    for num_layers in range(1, 40):
        shape = read_shape({**CONFIG, "num_hidden_layers": num_layers}, "")
        for stages in range(1, min(num_layers, 9) + 1):
            layers = Layout(pipeline_parallel=stages).stage_layers(shape)
            assert sum(layers) == num_layers and len(layers) == stages and min(layers) >= 1
            assert len(set(layers[1:-1])) <= 1


def test_a_layout_that_cannot_be_names_the_choices() -> None:
    shape = read_shape(CONFIG, "")
    with pytest.raises(UserError, match=r"TP=4 does not divide the model's 2 KV heads: choose TP from 1, 2"):
        check_layout(Layout(tensor_parallel=4), shape)
    with pytest.raises(UserError, match=r"PP=3 is more than the model's 2 layers"):
        check_layout(Layout(pipeline_parallel=3), shape)


def test_shards_keep_to_their_size_and_the_index_finds_every_tensor(tmp_path: Path) -> None:
    from safetensors import safe_open

    tensors = {f"layer.{i}": torch.full((100,), float(i)) for i in range(10)}
    write_weights(tmp_path, tensors.items(), max_shard_bytes=1000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4000
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
        f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)
    ]
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as weights:
            assert torch.equal(weights.get_tensor(name), tensors[name])


def _edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


DAMAGE = {
    "no config.json": (lambda m: (m / "config.json").unlink(), "model configuration"),
    "config.json is not JSON": (lambda m: (m / "config.json").write_text("{"), "is not valid JSON"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "has no model.safetensors"),
    "weights cut short": (
        lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:5000]),
        "is damaged",
    ),
    "another number of layers": (lambda m: _edit_config(m, num_hidden_layers=4), "12 tensors are missing"),
    "fewer layers": (lambda m: _edit_config(m, num_hidden_layers=2), "12 tensors are not known for qwen2"),
    "another width": (lambda m: _edit_config(m, intermediate_size=90), "do not belong together"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_model_folder_gives_one_line_and_leaves_nothing(tiny_qwen2: Path, tmp_path: Path, what: str) -> None:
    damage, reason = DAMAGE[what]
    model = tmp_path / "model"
    shutil.copytree(tiny_qwen2, model)
    damage(model)
    output = tiny.run_module("convert", "--hf-dir", model, "--output", tmp_path / "out", status=2)
    assert output.startswith("error: ") and output.count("\n") == 1 and reason in output
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


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("/tmp/megatron_sft_was_here"),))


def test_a_checkpoint_that_would_run_code_is_refused(converted: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    import pickle

    mark = Path("/tmp/megatron_sft_was_here")
    evil = tmp_path / "evil"
    shutil.copytree(converted, evil)
    (evil / "iter_0000001" / ".metadata").write_bytes(pickle.dumps(_Evil()))
    (evil / "iter_0000001" / "manifest.json").write_text(
        json.dumps({**json.loads((evil / "iter_0000001" / "manifest.json").read_text()), "files": {}})
    )
    output = tiny.run_module("export", "--load", evil, "--hf-dir", tiny_qwen2, "--output", tmp_path / "out", status=2)
    assert "is damaged or not to be trusted" in output
    assert not mark.exists()
