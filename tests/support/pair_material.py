"""Tokenised pairs for the tests of objectives: random ones, and TRL's trainers on the same token ids."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import tiny


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and of its two answers."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def random_pair_rows(num_rows: int, length: int, seed: int = 0, longest: int = 14, prompt: int = 0) -> list[list[Pair]]:
    """Rows of as many random pairs as fit. prompt: tokens of every prompt, 0 for lengths at random."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        row: list[Pair] = []
        room = length
        while room >= 4 * longest:
            sizes = generator.integers(1, longest + 1, 3)
            sizes[0] = prompt or sizes[0]
            row.append(Pair(*(generator.integers(1, tiny.VOCAB_SIZE, size).tolist() for size in sizes)))
            room -= 2 * int(sizes[0]) + int(sizes[1]) + int(sizes[2])
        rows.append(row)
    return rows


def write_pair_rows(prefix: Path, rows: Sequence[Sequence[Pair]], length: int) -> Path:
    """Write rows of pairs as tokenised data with a manifest; returns the prefix."""
    from megatron.sft.data.tokenized import data_file
    from megatron.sft.runtime.manifest import sealed, write_json

    conversations = [
        [(np.array(p.prompt), np.array(answer)) for p in row for answer in (p.chosen, p.rejected)] for row in rows
    ]
    tiny.write_rows(prefix, conversations, length)
    path = data_file(prefix, "json")
    manifest: dict[str, Any] = json.loads(path.read_text())
    write_json(path, sealed({**manifest, "pairs": sum(map(len, rows))}))
    return prefix


def trl_dpo_trainer(model: Any, reference: Any, output: Path, settings: Mapping[str, Any]) -> Any:
    """TRL's own DPOTrainer in float32 on the CPU, with one pair of text that its constructor needs; batches come from `collate`."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from tests.support.taught import untrained_folder

    config = DPOConfig(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        disable_dropout=True,
        report_to=[],
        **settings,
    )
    texts = Dataset.from_list([{"prompt": "Ada", "chosen": " Tom", "rejected": " Leo"}])
    tokenizer = AutoTokenizer.from_pretrained(untrained_folder())
    tokenizer.pad_token_id = 0
    return DPOTrainer(model, ref_model=reference, args=config, train_dataset=texts, processing_class=tokenizer)


def collate(trainer: Any, pairs: Sequence[Pair]) -> dict[str, Any]:
    """TRL's batch of these token ids."""
    ids = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]
    batch: dict[str, Any] = trainer.data_collator(ids)
    return batch
