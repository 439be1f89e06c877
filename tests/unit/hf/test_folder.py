"""Safetensors files as they are written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.sft import convert
from megatron.sft.hf.folder import write_weights
from megatron.sft.inference.model_folder import open_model_folder
from megatron.sft.runtime.errors import UserError
from tests.support import tiny


def test_shards_keep_to_their_size_and_the_index_finds_every_tensor(tmp_path: Path) -> None:
    from safetensors import safe_open

    tensors = {f"layer.{i}": torch.full((100,), float(i)) for i in range(10)}
    write_weights(tmp_path, tensors, iter(tensors.items()), max_shard_bytes=1000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4000
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
        f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)
    ]
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as weights:
            assert torch.equal(weights.get_tensor(name), tensors[name])


def _of_float64(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(path).items()}, path)


def _with_other_names(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file({f"base_model.{name}": tensor for name, tensor in load_file(path).items()}, path)


def _untied(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


def _as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _as_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _with_cut_settings(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id"')
    with pytest.raises(UserError, match=r"generation_config\.json"):
        open_model_folder(folder)


@pytest.mark.parametrize(
    "damage, message",
    [
        (_with_cut_settings, "generation_config.json"),
        (_of_float64, "DTYPE=fp32"),
        (_with_other_names, "base_model.model.embed_tokens.weight"),
        (_untied, "set tie_word_embeddings to true"),
        (_as_pickle, "pytorch_model.bin"),
        (_as_pointer, "git lfs pull"),
    ],
)
def test_a_folder_that_cannot_be_converted_is_refused_with_a_way_out(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tiny.save_qwen2(tmp_path / "model", tied=True)
    damage(folder)
    with pytest.raises(UserError) as error:
        convert.main(["--source", str(folder), "--output", str(tmp_path / "converted"), "--verify", "0"])
    assert message in str(error.value)
    assert not (tmp_path / "converted").exists()


def test_weights_in_64_bits_are_converted_and_exported_where_a_dtype_is_given(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from megatron.sft import export

    folder, converted, exported = tiny.save_qwen2(tmp_path / "model", tied=True), tmp_path / "converted", tmp_path / "exported"
    _of_float64(folder)
    convert.main(["--source", str(folder), "--output", str(converted), "--verify", "0", "--dtype", "fp32"])
    export.main(["--load", str(converted), "--hf-dir", str(folder), "--output", str(exported)])
    given, written = load_file(folder / "model.safetensors"), load_file(exported / "model.safetensors")
    assert {name: tensor.double() for name, tensor in written.items()}.keys() == given.keys()
    assert all(written[name].dtype == torch.float32 and torch.equal(written[name].double(), given[name]) for name in given)


def test_a_manifest_names_its_source_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.sft.checkpoint.folder import open_checkpoint

    tiny.save_qwen2(tmp_path / "model", tied=True)
    monkeypatch.chdir(tmp_path)
    convert.main(["--source", "model", "--output", "converted", "--verify", "0"])
    assert open_checkpoint(tmp_path / "converted").manifest["source"]["path"] == str(tmp_path / "model")
