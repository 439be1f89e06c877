"""Model folders as other programs leave them: fused experts, stale indices, two dtype fields, tokens without a row."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.sft import convert, export
from megatron.sft.hf.folder import HFFolder
from tests.support import tiny, tiny_families

INDEX = "model.safetensors.index.json"


def converted_and_exported(model: Path, folder: Path, *options: str) -> Path:
    assert convert.main(["--source", str(model), "--output", str(folder / "checkpoint"), *options]) == 0
    arguments = ["--load", str(folder / "checkpoint"), "--hf-dir", str(model), "--output", str(folder / "export")]
    assert export.main(arguments) == 0
    return folder / "export"


def test_kimi_k2_is_compared_with_transformers_as_the_deepseek_v3_that_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_families.save_family(tmp_path / "model", "moonlight_moe_bf16")
    config = json.loads((model / "config.json").read_text())
    of_kimi = {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    (model / "config.json").write_text(json.dumps({**config, **of_kimi}))
    exported = converted_and_exported(model, tmp_path, "--verify", "1")
    assert "verified: logits as transformers'" in capsys.readouterr().out
    tiny.assert_same_weights(exported, model)


def fused(model: Path, out: Path, block: str, names: tuple[str, str, str], shards: int = 1) -> Path:
    """The folder with transformers 5's fused tensors, the router with the experts in `block`."""
    shutil.copytree(model, out)
    (out / "model.safetensors").unlink()
    tensors = load_file(model / "model.safetensors")
    old = "block_sparse_moe" if any("block_sparse_moe" in name for name in tensors) else "mlp"
    gate, up, down = names
    result = {n.replace(f".{old}.", f".{block}."): t for n, t in tensors.items() if ".experts." not in n}
    for layer in sorted({n.split(f".{old}.experts.")[0] for n in tensors if ".experts." in n}):
        num = len({n for n in tensors if n.startswith(f"{layer}.{old}.experts.") and n.endswith(f"{gate}.weight")})
        experts = [f"{layer}.{old}.experts.{index}" for index in range(num)]
        both = [torch.cat([tensors[f"{e}.{gate}.weight"], tensors[f"{e}.{up}.weight"]]) for e in experts]
        result[f"{layer}.{block}.experts.gate_up_proj"] = torch.stack(both)
        result[f"{layer}.{block}.experts.down_proj"] = torch.stack([tensors[f"{e}.{down}.weight"] for e in experts])
    if shards == 1:
        save_file(result, out / "model.safetensors", metadata={"format": "pt"})
        return out
    weight_map = {}
    for shard in range(shards):
        part = dict(sorted(result.items())[shard::shards])
        save_file(part, out / f"part-{shard}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, f"part-{shard}.safetensors")
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return out


QWEN, MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")


@pytest.mark.parametrize(
    ("family", "block", "names", "shards"),
    [
        ("qwen3_moe", "mlp", QWEN, 1),
        ("qwen3_moe", "mlp", QWEN, 3),
        ("mixtral", "mlp", MIXTRAL, 1),
        ("mixtral", "mlp", MIXTRAL, 2),
        ("mixtral", "block_sparse_moe", MIXTRAL, 1),
    ],
)
@pytest.mark.parametrize("form", ["torch_dist", "torch"])
def test_fused_experts_come_back_bit_for_bit_in_the_same_form(
    family: str, block: str, names: tuple[str, str, str], shards: int, form: str, tmp_path: Path
) -> None:
    single = tiny_families.save_family(tmp_path / "single", family)
    model = fused(single, tmp_path / "fused", block, names, shards)
    result = converted_and_exported(model, tmp_path, "--ckpt-format", form)
    expected: dict[str, torch.Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        expected |= load_file(path)
    found = load_file(result / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    ours, theirs = HFFolder(model), HFFolder(single)
    assert ours.tensor_names == theirs.tensor_names
    assert all(torch.equal(ours.tensor(name), theirs.tensor(name)) for name in theirs.tensor_names)


@pytest.mark.parametrize("family", ["mixtral", "minimax_m2_moe", "ernie4_5_moe", "qwen2_moe"])
def test_what_transformers_saves_fused_is_read_and_it_reads_the_export(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    single = tiny_families.save_family(tmp_path / "single", family)
    model = AutoModelForCausalLM.from_pretrained(single)
    model.save_pretrained(tmp_path / "saved", save_original_format=False)
    assert any(name.endswith("gate_up_proj") for name in load_file(tmp_path / "saved" / "model.safetensors"))
    again = AutoModelForCausalLM.from_pretrained(converted_and_exported(tmp_path / "saved", tmp_path))
    tokens = torch.arange(20)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_fused_experts_of_another_number_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = fused(tiny_families.save_family(tmp_path / "single", "qwen3_moe"), tmp_path / "fused", "mlp", QWEN)
    config = json.loads((model / "config.json").read_text())
    field = "num_experts" if "num_experts" in config else "num_local_experts"
    (model / "config.json").write_text(json.dumps(config | {field: config[field] + 1}))
    with pytest.raises(Exception, match=f"says {config[field] + 1} experts"):
        HFFolder(model)


@pytest.mark.parametrize("shard", ["gone", "older", "itself", "of another model"])
def test_a_single_weight_file_wins_over_an_index_as_in_transformers(
    shard: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    file = "model.safetensors" if shard == "itself" else "model-00001-of-00001.safetensors"
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}))
    if shard == "older":
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, model / file, metadata={"format": "pt"})
    if shard == "of another model":
        save_file({"other": torch.zeros(2)}, model / file, metadata={"format": "pt"})
    result = converted_and_exported(model, tmp_path)
    found = load_file(result / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert f"{INDEX} next to it is ignored" in capsys.readouterr().out
    assert not (result / INDEX).exists()


@pytest.mark.parametrize(
    ("fields", "option", "expected"),
    [
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, (), "bfloat16"),  # the weights are bfloat16
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, (), "bfloat16"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, ("--dtype", "fp32"), "float32"),
        ({"dtype": "bfloat16", "torch_dtype": "bfloat16"}, ("--dtype", "fp16"), "float16"),
        ({"torch_dtype": "bfloat16"}, ("--dtype", "fp32"), "float32"),
        ({"dtype": "bfloat16"}, ("--dtype", "fp32"), "float32"),
    ],
)
def test_every_dtype_field_of_an_export_is_the_weights(
    fields: dict[str, str], option: tuple[str, ...], expected: str, tiny_llama: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "config.json").read_text())
    config.pop("dtype", None), config.pop("torch_dtype", None)
    (model / "config.json").write_text(json.dumps(config | fields))
    result = converted_and_exported(model, tmp_path, *option)
    exported = json.loads((result / "config.json").read_text())
    assert {name: exported[name] for name in ("dtype", "torch_dtype") if name in exported} == dict.fromkeys(fields, expected)
    assert {str(t.dtype) for t in load_file(result / "model.safetensors").values()} == {f"torch.{expected}"}


SHORT = {"content": "<short>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


@pytest.mark.parametrize(
    ("file", "content", "token"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"49152": SHORT}}, "<short>"),
        ("tokenizer_config.json", {"pad_token": "[PAD]"}, "[PAD]"),
        ("tokenizer_config.json", {"additional_special_tokens": ["<short>"]}, "<short>"),
        ("special_tokens_map.json", {"mask_token": SHORT}, "<short>"),
        ("added_tokens.json", {"<short>": 49152}, "<short>"),
    ],
)
def test_a_token_that_tokenizer_json_lacks_gets_a_row_everywhere(
    file: str, content: dict[str, object], token: str, tmp_path: Path
) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from megatron.sft.chat.encoding import load_tokenizer
    from megatron.sft.hf.tokenizer_files import num_tokens, tokenizer_sha256
    from tests.support.material import smollm2_folder

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(**sizes, num_key_value_heads=1, vocab_size=49152, max_position_embeddings=64)
    model = tiny.save_random(Qwen2ForCausalLM(config), tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(smollm2_folder() / name, model / name)
    known = json.loads((model / file).read_text()) if (model / file).exists() else {}
    (model / file).write_text(json.dumps(known | content))
    tokenizer = load_tokenizer(model)
    assert tokenizer(token).input_ids == [49152]
    assert len(tokenizer) == num_tokens(model) == 49153
    assert tokenizer_sha256(model) != tokenizer_sha256(smollm2_folder())
    result = converted_and_exported(model, tmp_path)
    weights = load_file(result / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape == weights["lm_head.weight"].shape == (49153, 16)
    assert json.loads((result / "config.json").read_text())["vocab_size"] == 49153
    assert load_tokenizer(result)(token).input_ids == [49152]


def test_a_token_whose_stated_id_is_not_free_is_refused_with_both(tmp_path: Path) -> None:
    from megatron.sft.chat.encoding import load_tokenizer
    from megatron.sft.runtime.errors import UserError
    from tests.support.material import smollm2_folder

    shutil.copyfile(smollm2_folder() / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"50000": SHORT}}))
    with pytest.raises(UserError, match=r"'<short>' id 50000.* 49152"):
        load_tokenizer(tmp_path, template_needed=False)
