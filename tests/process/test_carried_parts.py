"""Models with a vision tower or more heads next to the text model, and weights in 8 bits: what is not trained is not lost."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import tiny, tiny_families

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4,
    "vocab_size": tiny.VOCAB_SIZE, "max_position_embeddings": 512, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
PIXTRAL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
VISION: dict[str, dict[str, Any]] = {
    "Qwen3_5": {
        "hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 2, "out_hidden_size": 64,
        "num_position_embeddings": 16,
    },
    "Gemma3": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    },
    "Qwen3_5Moe": {
        "hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 2, "out_hidden_size": 64,
        "num_position_embeddings": 16,
    },
    "Mistral3": {**PIXTRAL, "model_type": "pixtral", "patch_size": 14, "head_dim": 16},
}  # fmt: skip
# The class -> what its text_config says besides.
WHOLE: dict[str, dict[str, Any]] = {
    "Qwen3_5": tiny_families.FAMILIES["qwen3_5"][1],
    "Qwen3_5Moe": tiny_families.FAMILIES["qwen3_5_moe"][1],
    "Gemma3": {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 24},
    "Mistral3": {**tiny_families.FAMILIES["ministral3"][1], "model_type": "ministral3"},
}


def save_whole(folder: Path, name: str, tied: bool = False) -> Path:
    """A tiny random model of this class with its vision tower."""
    import transformers

    more: dict[str, Any] = {"mm_tokens_per_image": 4} if name == "Gemma3" else {}
    text = {**TEXT, **WHOLE[name], "tie_word_embeddings": tied}
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=VISION[name], tie_word_embeddings=tied, **more
    )
    return tiny.save_random(getattr(transformers, f"{name}ForConditionalGeneration")(config), folder)


def rewrite(folder: Path, change: Any) -> None:
    """Replace the tensors of a folder with one weight file by `change` of them."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def trained_and_exported(model: Path, packed_rows: Path, tmp_path: Path) -> Path:
    """The export of a run of one step."""
    tiny.run_module("convert", "--source", model, "--output", tmp_path / "checkpoint", "--verify", "1")
    options = ["--load", tmp_path / "checkpoint", "--data-path", packed_rows, "--precision", "fp32", "--lr", "1e-2"]
    tiny.launch(1, "train", "train", *options, "--save", tmp_path / "run", "--train-iters", "1", "--global-batch-size", "2")
    tiny.run_module("export", "--load", tmp_path / "run", "--hf-dir", model, "--output", tmp_path / "trained")
    return tmp_path / "trained"


@pytest.mark.parametrize(("name", "tied"), [("Qwen3_5", True), ("Qwen3_5Moe", False), ("Gemma3", True), ("Mistral3", False)])
def test_the_text_model_is_trained_and_the_rest_of_the_folder_is_exported_bit_for_bit(
    name: str, tied: bool, packed_rows: Path, tmp_path: Path
) -> None:
    """Older versions of transformers put `language_model.` before all names of the text model."""
    model = save_whole(tmp_path / "model", name, tied)
    if name == "Qwen3_5":
        rewrite(
            model, lambda tensors: {**tensors, "mtp.layers.0.norm.weight": torch.randn(64), "mtp.fc.weight": torch.randn(9)}
        )
    elif name == "Gemma3":
        rewrite(model, lambda tensors: {old_name(key): tensor for key, tensor in tensors.items()})
    trained = trained_and_exported(model, packed_rows, tmp_path)
    before, after = tiny.tensors(model), tiny.tensors(trained)
    assert before.keys() == after.keys()
    text = {key for key in before if "language_model" in key or key.startswith("lm_head")}
    changed = {key for key in before if not torch.equal(before[key], after[key])}  # type: ignore[arg-type]
    assert changed and changed <= text and len(changed) > len(text) / 2
    assert json.loads((trained / "config.json").read_text()) == json.loads((model / "config.json").read_text())
    untrained = tmp_path / "untrained"
    # Without the vision tower's weights in the original folder: they lie with the checkpoint.
    rewrite(model, lambda tensors: {key: tensor for key, tensor in tensors.items() if key in text})
    tiny.run_module("export", "--load", tmp_path / "checkpoint", "--hf-dir", model, "--output", untrained)
    whole = tiny.tensors(untrained)
    assert whole.keys() == before.keys()
    assert all(torch.equal(whole[key], before[key]) for key in before)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["Qwen3_5", "Gemma3"])
def test_adapters_of_the_text_model_fit_the_whole_model_in_peft(name: str, packed_rows: Path, tmp_path: Path) -> None:
    """In Gemma 3's folder the text model has its old names, and its vision tower has modules named q_proj too."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    model = save_whole(tmp_path / "model", name)
    if name == "Gemma3":
        rewrite(model, lambda tensors: {old_name(key): tensor for key, tensor in tensors.items()})
    tiny.run_module("convert", "--source", model, "--output", tmp_path / "checkpoint")
    options = ["--load", tmp_path / "checkpoint", "--data-path", packed_rows, "--precision", "fp32", "--global-batch-size", "2"]
    start = ["--lora-rank", "4", "--lr", "1e-2", "--train-iters", "2"]
    tiny.launch(1, "train", "train", *options, *start, "--save", tmp_path / "run")
    export = ["--load", tmp_path / "run", "--hf-dir", model]
    tiny.run_module("export", *export, "--output", tmp_path / "adapter")
    said = tiny.run_module("export", *export, "--output", tmp_path / "merged", "--merge", "--verify", "1")
    assert "verified: logits as of the adapter" in said
    base = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    factors = {key.replace(".default", "") for key, _ in adapted.named_parameters() if "lora_" in key}
    assert factors == tiny.tensors(tmp_path / "adapter").keys()
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = torch.arange(50)[None]
    with torch.no_grad():
        ours, theirs = merged(input_ids=ids).logits, adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            assert (adapted(input_ids=ids).logits - theirs).abs().max() > 1e-2 * theirs.abs().max()
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    again = ["--lora-init-from", tmp_path / "adapter", "--lr", "0", "--min-lr", "0", "--train-iters", "1"]
    tiny.launch(1, "train", "train", *options, *again, "--save", tmp_path / "again")
    tiny.run_module("export", "--load", tmp_path / "again", "--hf-dir", model, "--output", tmp_path / "same")
    tiny.assert_same_weights(tmp_path / "adapter", tmp_path / "same")


def old_name(name: str) -> str:
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    return name.removeprefix("model.") if name.startswith("model.") else name


def in_8_bits(tensors: dict[str, torch.Tensor], block: int) -> dict[str, torch.Tensor]:
    """The matrices of layers as float8 with a scale for each block, as DeepSeek and Qwen publish them."""
    result = {}
    for name, tensor in tensors.items():
        if ".layers." not in name or tensor.dim() != 2:
            result[name] = tensor
            continue
        rows, columns = (-(-size // block) for size in tensor.shape)
        scales = 0.001 + torch.rand(rows, columns, generator=torch.Generator().manual_seed(len(name))) / 100
        factors = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)[: tensor.shape[0], : tensor.shape[1]]
        result[name] = (tensor / factors).to(torch.float8_e4m3fn)
        result[f"{name}_scale_inv"] = scales
    return result


def test_weights_in_8_bits_are_read_as_bfloat16_and_exported_without_the_quantization_entry(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    model = tiny_families.save_family(tmp_path / "model", "qwen3_bf16")
    rewrite(model, lambda tensors: in_8_bits(tensors, 16))
    config = json.loads((model / "config.json").read_text())
    entry = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
    output = tiny.run_module("convert", "--source", model, "--output", tmp_path / "checkpoint")
    assert "35 weights are in 8 bits: they are read as bfloat16, times their scales" in output
    output = tiny.run_module("export", "--load", tmp_path / "checkpoint", "--hf-dir", model, "--output", tmp_path / "exported")
    assert "the quantization entry is gone" in output
    assert json.loads((tmp_path / "exported" / "config.json").read_text()) == config
    way_back = Fp8Dequantize(None)
    original, exported = load_file(model / "model.safetensors"), tiny.tensors(tmp_path / "exported")
    for name, tensor in exported.items():
        assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.bfloat16
        stored = original[name]
        if stored.dtype == torch.float8_e4m3fn:
            stored = way_back._dequantize_one(stored, original[f"{name}_scale_inv"], torch.bfloat16)
        assert torch.equal(tensor, stored), name


def test_8_bit_weights_without_scales_or_without_an_entry_in_config_json_are_refused(tmp_path: Path) -> None:
    model = tiny_families.save_family(tmp_path / "model", "qwen3_bf16")
    rewrite(model, lambda tensors: in_8_bits(tensors, 16))
    options = ["--source", model, "--output", tmp_path / "checkpoint"]
    assert "are in 8 bits, config.json does not say so" in tiny.run_module("convert", *options, status=2)
    rewrite(model, lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale_inv")})
    assert "is in 8 bits and has no scales" in tiny.run_module("convert", *options, status=2)


def test_deepseek_v3_as_published_in_8_bits_with_a_head_for_a_further_token(packed_rows: Path, tmp_path: Path) -> None:
    """The weights are trained, the head is exported as it was, also where the experts lie in transformers 5's form."""
    model = tiny_families.save_family(tmp_path / "model", "moonlight_moe_bf16")

    def with_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        head = {name.replace("layers.4.", "layers.5."): each + 1 for name, each in tensors.items() if "layers.4." in name}
        head |= {"model.layers.5.eh_proj.weight": torch.ones(64, 128).bfloat16()}
        return {**tensors, **head, "model.layers.5.enorm.weight": torch.ones(64).bfloat16()}

    rewrite(model, lambda tensors: in_8_bits(with_head(tensors), 16))
    config = json.loads((model / "config.json").read_text())
    entry = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
    output = tiny.run_module("convert", "--source", model, "--output", tmp_path / "checkpoint")
    assert "weights are in 8 bits" in output and "38 tensors of model.layers.5 are kept for the export" in output
    tiny.run_module("export", "--load", tmp_path / "checkpoint", "--hf-dir", model, "--output", tmp_path / "exported")
    # In bfloat16, with the same head: what is trained in the first form, and comes back in the second one.
    original = tiny.tensors(tmp_path / "exported")
    assert {name for name in original if "layers.5." in name} == {
        name for name in load_file(model / "model.safetensors") if "layers.5." in name and not name.endswith("_scale_inv")
    }
    bias = original["model.layers.3.mlp.gate.e_score_correction_bias"]
    assert isinstance(bias, torch.Tensor) and bias.dtype == torch.float32
    fused = tmp_path / "fused"
    tiny.run_module("export", "--load", tmp_path / "checkpoint", "--hf-dir", model, "--output", fused)
    rewrite(fused, in_one_tensor)
    trained = trained_and_exported(fused, packed_rows, tmp_path / "again")
    before, after = tiny.tensors(fused), tiny.tensors(trained)
    assert before.keys() == after.keys() and "model.layers.3.mlp.experts.gate_up_proj" in after
    changed = {name for name in before if not torch.equal(before[name], after[name])}  # type: ignore[arg-type]
    assert not [name for name in changed if "layers.5." in name or "correction_bias" in name]
    latent = {f"model.layers.{layer}.self_attn.{part}.weight" for layer in range(5) for part in ("q_proj", "kv_b_proj")}
    assert changed >= {"model.layers.3.mlp.experts.gate_up_proj", "model.layers.3.mlp.shared_experts.up_proj.weight", *latent}


def in_one_tensor(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of each layer but the head's as one tensor for their gates and ups, and one for their downs."""
    result = dict(tensors)
    for layer in range(1, 5):
        block, parts = f"model.layers.{layer}.mlp.experts.", ("gate_proj", "up_proj", "down_proj")
        gates, ups, downs = (
            torch.stack([result.pop(f"{block}{expert}.{part}.weight") for expert in range(8)]) for part in parts
        )
        result |= {f"{block}gate_up_proj": torch.cat([gates, ups], dim=1), f"{block}down_proj": downs}
    return result
