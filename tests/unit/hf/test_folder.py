"""Safetensors files as they are written."""

import json
from pathlib import Path

import torch

from megatron.sft.hf.folder import write_weights


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
