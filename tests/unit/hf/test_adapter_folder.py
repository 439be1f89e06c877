"""An adapter in PEFT's format is read where it means what ours mean, and refused by name where it does not."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.registry import read_architecture
from megatron.sft.hf.adapter_folder import CONFIG, WEIGHTS, AdapterFolder, write_adapter_folder
from megatron.sft.runtime.errors import UserError
from tests.support import peft_oracle, tiny, tiny_families

ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
FIRST_Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    peft_oracle.make(folder, "qwen2", target_modules=ALL, lora_dropout=0.25)
    return folder


@pytest.fixture(scope="module")
def architecture(made: Path) -> Architecture:
    return _architecture(made / "hf")


def _architecture(model: Path) -> Architecture:
    return read_architecture(json.loads((model / "config.json").read_text()), "config.json")


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "adapter", tmp_path / "adapter"))


def configure(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def read_all(folder: Path, architecture: Architecture) -> None:
    adapter = AdapterFolder(folder)
    adapter.lora(architecture)
    for name in load_file(folder / WEIGHTS):
        adapter.tensor(name)


def refusal(folder: Path, architecture: Architecture) -> str:
    with pytest.raises(UserError) as error:
        read_all(folder, architecture)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_what_peft_saved_is_read(adapter: Path, architecture: Architecture) -> None:
    folder = AdapterFolder(adapter)
    lora = folder.lora(architecture)
    assert (lora.rank, lora.alpha, lora.targets, lora.experts) == (4, 8.0, tuple(ALL), False)
    assert (lora.dropout, lora.rslora, lora.scale) == (0.25, False, 2.0)
    for name, tensor in load_file(adapter / WEIGHTS).items():
        assert torch.equal(folder.tensor(name), tensor) and folder.tensor(name).dtype == torch.float32


def test_rslora_and_16_bit_factors_are_read(adapter: Path, architecture: Architecture) -> None:
    configure(adapter, use_rslora=True)
    change(adapter, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    folder = AdapterFolder(adapter)
    assert folder.lora(architecture).scale == 4.0
    assert folder.tensor(f"{FIRST_Q}.lora_A.weight").dtype == torch.float32


def test_what_is_written_is_read_again_and_loads_in_peft(adapter: Path, architecture: Architecture, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftConfig

    tensors = load_file(adapter / WEIGHTS)
    (tmp_path / "written").mkdir()
    lora = AdapterFolder(adapter).lora(architecture)
    write_adapter_folder(tmp_path / "written", lora, "some/model", tensors)
    again = AdapterFolder(tmp_path / "written")
    assert again.lora(architecture) == lora
    assert all(torch.equal(again.tensor(name), tensor) for name, tensor in tensors.items())
    config = PeftConfig.from_pretrained(str(tmp_path / "written"))
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 8, set(ALL))


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "LOHA"),
    ({"peft_type": None}, "None"),
    ({"use_dora": True}, "DoRA"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
    ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    ({"bias": "all"}, "bias"),
    ({"lora_bias": True}, "lora_bias"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ({"layers_to_transform": [0, 1]}, "layers_to_transform"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"init_lora_weights": "pissa"}, "pissa"),
    ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
    ({"init_lora_weights": "olora"}, "olora"),
    ({"init_lora_weights": "loftq"}, "loftq"),
    ({"init_lora_weights": "corda"}, "corda"),
    ({"use_qalora": True}, "use_qalora"),
    ({"a_new_kind": {"x": 1}}, "a_new_kind"),
    ({"r": 0}, "r 0"),
    ({"r": "8"}, "r '8'"),
    ({"r": 8.0}, "r 8.0"),
    ({"lora_alpha": 0}, "lora_alpha 0"),
    ({"lora_alpha": float("nan")}, "lora_alpha nan"),
    ({"lora_alpha": None}, "lora_alpha None"),
    ({"lora_dropout": "much"}, "lora_dropout 'much'"),
]


@pytest.mark.parametrize(("fields", "named"), CONFIGS, ids=[named for _, named in CONFIGS])
def test_what_is_not_plain_lora_is_refused(
    adapter: Path, architecture: Architecture, fields: dict[str, Any], named: str
) -> None:
    configure(adapter, **fields)
    assert named in refusal(adapter, architecture)


def _renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if re.search(old, name)]:
            tensors[re.sub(old, new, name)] = tensors.pop(name)

    return edit


def _poisoned(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{FIRST_Q}.lora_B.weight"][3, 1] = float("nan")


A, B = f"{FIRST_Q}.lora_A.weight", f"{FIRST_Q}.lora_B.weight"
CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], list[str]]] = {
    "NaN": (_poisoned, [B, "NaN"]),
    "a factor is missing": (lambda tensors: tensors.pop(B), [B]),
    "an unknown tensor": (lambda tensors: tensors.update({f"{FIRST_Q}.lora_C.weight": torch.zeros(1)}), ["lora_C"]),
    "only some layers": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.4." in name],
        ["model.layers.4."],
    ),
    "a module of one layer": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.2.mlp.up_proj" in name],
        ["model.layers.2.mlp.up_proj"],
    ),
    "more layers": (_renamed(r"layers\.0\.", "layers.7."), ["model.layers.7."]),
    "another model's modules": (_renamed("self_attn.q_proj", "attn.c_attn"), ["attn.c_attn"]),
    "names without lora_": (_renamed("lora_", "lokr_"), ["not a module"]),
    "adapter names of PEFT's state": (_renamed(r"lora_A\.weight", "lora_A.default.weight"), ["lora_A.default"]),
    "the embedding": (
        lambda tensors: tensors.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 131)}),
        ["model.embed_tokens", "merge_and_unload"],
    ),
    "the head": (lambda tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}), ["lm_head"]),
    "another rank": (lambda tensors: tensors.update({A: torch.zeros(8, 64)}), [A, "[8, 64]", "[4, 64]"]),
    "another width": (lambda tensors: tensors.update({A: torch.zeros(4, 128)}), [A, "[4, 128]"]),
    "other outputs": (lambda tensors: tensors.update({B: torch.zeros(32, 4)}), [B, "[32, 4]"]),
    "transposed": (lambda tensors: tensors.update({B: torch.zeros(4, 64)}), [B, "[64, 4]"]),
    "integers": (lambda tensors: tensors.update({A: torch.zeros(4, 64, dtype=torch.int8)}), [A, "int8"]),
    "nothing": (lambda tensors: tensors.clear(), ["no tensors"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_tensors_that_do_not_fit_the_model_are_refused(adapter: Path, architecture: Architecture, name: str) -> None:
    edit, named = CHANGES[name]
    change(adapter, edit)
    message = refusal(adapter, architecture)
    assert all(part in message for part in named), message


def test_an_adapter_of_a_larger_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    tiny.save_qwen2(tmp_path / "smaller", tied=False)
    assert "model.layers.3." in refusal(adapter, _architecture(tmp_path / "smaller"))


def test_a_factor_for_all_experts_is_refused(adapter: Path, tmp_path: Path) -> None:
    """As transformers 5 and PEFT's target_parameters name them, whatever the configuration says."""
    model = tiny_families.save_family(tmp_path / "experts", "qwen3_moe")
    name = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    change(adapter, lambda tensors: (tensors.clear(), tensors.update({name: torch.zeros(32, 64)})))
    assert "model.layers.0.mlp.experts" in refusal(adapter, _architecture(model))


def test_missing_and_damaged_files_are_refused(adapter: Path, architecture: Architecture) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    for content in (whole[:-100], whole[:40], b"", whole + b"\0"):
        (adapter / WEIGHTS).write_bytes(content)
        assert "damaged" in refusal(adapter, architecture)
    (adapter / WEIGHTS).unlink()
    assert "has no adapter_model.safetensors" in refusal(adapter, architecture)
    (adapter / "adapter_model.bin").write_bytes(b"a pickle")
    assert "adapter_model.bin" in refusal(adapter, architecture)
    (adapter / CONFIG).write_text("{")
    assert "not valid JSON" in refusal(adapter, architecture)
    (adapter / CONFIG).write_text("[]")
    assert "peft_type" in refusal(adapter, architecture)
    (adapter / CONFIG).unlink()
    assert "has no adapter_config.json" in refusal(adapter, architecture)
