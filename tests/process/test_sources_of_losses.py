"""Data mixed from several sources: every conversation keeps its source, and training reports the losses by source."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.sft.data.tokenized import data_file
from megatron.sft.runtime.manifest import sealed, sha256_of_file, write_json
from tests.support import tiny

NAMES = ["sums", "words"]


@pytest.fixture(scope="module")
def mixed_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[tiny.Conversation]], np.ndarray]:
    """8 packed rows whose conversations are of two sources in turn, at random; with the rows and the sources."""
    rows = tiny.random_rows(8, 128)
    prefix = tiny.write_rows(tmp_path_factory.mktemp("mixed") / "data", rows, length=128)
    sources = np.random.default_rng(3).integers(0, 2, sum(map(len, rows))).astype(np.int16)
    sources.tofile(data_file(prefix, "sources"))
    manifest = json.loads(data_file(prefix, "json").read_text())
    manifest["sources"] = [{"path": f"/data/{name}.jsonl"} for name in NAMES]
    path = data_file(prefix, "sources")
    manifest["files"]["sources"] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    write_json(data_file(prefix, "json"), sealed(manifest))
    return prefix, rows, sources


def expected_losses(model_folder: Path, rows: list[list[tiny.Conversation]], sources: np.ndarray) -> dict[str, object]:
    """By transformers, every conversation alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    sums, counts = np.zeros(2), np.zeros(2, dtype=int)
    for (prompt, answer), source in zip((pair for row in rows for pair in row), sources, strict=True):
        tokens = torch.tensor(np.concatenate([prompt, answer]), dtype=torch.int64)
        with torch.no_grad():
            scores = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        losses = -scores.gather(1, tokens[1:, None])[len(prompt) - 1 :, 0]
        sums[source] += float(losses.sum())
        counts[source] += len(losses)
    return {
        name: {"loss": pytest.approx(total / count, rel=1e-5), "trained_tokens": count}
        for name, total, count in zip(NAMES, sums, counts.tolist(), strict=True)
    }


@pytest.mark.parametrize(("processes", "options"), [(2, []), (2, ["--pipeline-model-parallel-size", "2"])], ids=["DP2", "PP2"])
def test_losses_by_source_are_those_of_transformers_in_every_layout(
    train: Callable[..., Path],
    tiny_qwen2: Path,
    mixed_rows: tuple[Path, list[list[tiny.Conversation]], np.ndarray],
    processes: int,
    options: list[str],
) -> None:
    """The first step sees all rows, before any weight has changed."""
    prefix, rows, sources = mixed_rows
    folder = train(processes, "--train-iters", 2, *options, data=prefix)
    first = tiny.metrics(folder)[0]
    assert first["sources"] == expected_losses(tiny_qwen2, rows, sources)
