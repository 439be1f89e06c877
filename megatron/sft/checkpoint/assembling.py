"""The index of a checkpoint, made of what all processes have written, so that megatron-core's and torch's loaders read it."""

import json
import pickle
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron.sft.checkpoint import metadata_file, torch_dist
from megatron.sft.checkpoint.writing import HashedFile, StoredPiece, Written


def write_index(folder: Path, parts: Sequence[Written]) -> dict[str, dict[str, Any]]:
    """Write `.metadata`, `metadata.json` and `common.pt`; returns all files of the checkpoint for its manifest."""
    files = {name: record for part in parts for name, record in part.files.items()}
    index = _index([piece for part in parts for piece in part.pieces])
    contents = {
        metadata_file.FILE: pickle.dumps(index),
        "metadata.json": json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}).encode(),
    }
    for name, content in contents.items():
        file = HashedFile(folder / name)
        file.write(content)
        files[name] = file.record()
    common = HashedFile(folder / "common.pt")
    torch.save({"content_metadata": torch_dist.METADATA}, common.as_stream())
    files["common.pt"] = common.record()
    return files


def _index(pieces: Sequence[StoredPiece]) -> Metadata:
    """torch's index of the pieces, which must make up every tensor exactly."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for piece in pieces:
        properties = TensorProperties(dtype=getattr(torch, piece.dtype))
        facts = tensors.setdefault(piece.key, TensorStorageMetadata(properties, torch.Size(piece.whole), []))
        offsets = torch.Size(piece.offsets)
        facts.chunks.append(ChunkStorageMetadata(offsets, torch.Size(piece.sizes)))
        places[MetadataIndex(piece.key, offsets)] = _StorageInfo(piece.file, piece.first_byte, piece.num_bytes)
    assert len(places) == len(pieces), "a part of a tensor was written twice"
    for key, facts in tensors.items():
        stored = sum(prod(chunk.sizes) for chunk in facts.chunks)
        assert stored == prod(facts.size), f"{stored} of {prod(facts.size)} values of {key} were written"
    return Metadata({**tensors}, storage_data=places)
