"""Tokenised pairs for the tests of objectives: random ones, and TRL's trainers on the same token ids."""

import json
import os
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


def random_pair_rows(
    num_rows: int, length: int, seed: int = 0, longest: int = 14, prompt: int = 0, most: int = 99
) -> list[list[Pair]]:
    """Rows of as many random pairs as fit, `most` at most. prompt: tokens of every prompt, 0 for lengths at random."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        row: list[Pair] = []
        room = length
        while room >= 4 * longest and len(row) < most:
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

    conversations = [[(np.array(p.prompt), np.array(answer)) for p in row for answer in (p.chosen, p.rejected)] for row in rows]
    tiny.write_rows(prefix, conversations, length)
    path = data_file(prefix, "json")
    manifest: dict[str, Any] = json.loads(path.read_text())
    write_json(path, sealed({**manifest, "pairs": sum(map(len, rows))}))
    return prefix


def trl_dpo_trainer(model: Any, reference: Any, output: Path, settings: Mapping[str, Any]) -> Any:
    """TRL's own DPOTrainer in float32 on the CPU, with one pair of text that its constructor needs; batches come from
    `collate`."""
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


def save_changed(source: Path, output: Path, by: float) -> None:
    """A model of transformers with noise added to every weight, with the same configuration."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(output)


def leave_run() -> None:
    """Forget that a launcher started this process: TRL would join its group."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def first_step(plan: Any) -> tuple[dict[str, float], dict[str, Any], list[int]]:
    """Loss and metrics of the first step through the engine, gradients by our names, the numbers of its rows; in one
    process."""
    from megatron.sft.runtime.signals import StopRequest
    from megatron.sft.training import state
    from megatron.sft.training.engine import Engine
    from megatron.sft.training.feeder import Feeder
    from megatron.sft.training.reference import with_logps

    logps = with_logps(plan, StopRequest()).logps if plan.reference else None
    engine = Engine(plan)
    state.load_start(engine)
    feeder = Feeder(plan, logps)
    numbers = [n for part in feeder.training_numbers(0) for n in part if n is not None]
    means = engine.train_step(feeder.training(0)).loss.reduced()
    return {"loss": means.loss, **means.pairs}, hf_gradients(engine, plan.architecture), numbers


def hf_gradients(engine: Any, architecture: Any) -> dict[str, Any]:
    """The gradients of the only process, under transformers' names."""
    from megatron.sft.families.weight_names import checkpoint_name, weight_entries

    entries = {entry.megatron: entry for entry in weight_entries(architecture)}
    found = {}
    for live_name, parameter in engine.chunks[0].named_parameters():
        entry = entries[checkpoint_name(live_name, architecture)]
        gradient = parameter.main_grad
        if entry.megatron in ("embedding.word_embeddings.weight", "output_layer.weight"):
            gradient = gradient[: architecture.vocab_size]
        found |= dict(zip(entry.hf, entry.rule.to_hf(architecture, gradient), strict=True))
    return found


def trl_first_step(
    models: Mapping[str, Any], output: Path, settings: Mapping[str, Any], pairs: Sequence[Pair]
) -> dict[str, Any]:
    """Loss and metrics of one batch by TRL's DPOTrainer, and "gradients". models: of "model" and "reference"."""
    import copy

    model = copy.deepcopy(models["model"]).train()
    trainer = trl_dpo_trainer(model, copy.deepcopy(models["reference"]), output, settings)
    loss = trainer.compute_loss(model, collate(trainer, pairs))
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": float(loss), **metrics, "gradients": gradients}


def largest_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """The largest difference of two gradients of one parameter, relative to the norm of all gradients."""
    import torch

    assert ours.keys() == theirs.keys()
    whole = float(torch.stack([gradient.norm() for gradient in theirs.values()]).norm())
    return max(float((ours[name] - theirs[name]).norm()) for name in theirs) / whole


def trl_five_steps(
    models: Mapping[str, Any], output: Path, settings: Mapping[str, Any], steps: Sequence[Sequence[Pair]]
) -> Any:
    """The model after TRL's DPOTrainer has trained on these pairs, as many in every step."""
    import copy

    from datasets import Dataset

    model = copy.deepcopy(models["model"])
    common = {"per_device_train_batch_size": len(steps[0]), "max_steps": len(steps), "train_sampling_strategy": "sequential"}
    common |= {
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "optim": "adamw_torch",
    }
    trainer = trl_dpo_trainer(model, copy.deepcopy(models["reference"]), output, {**common, **settings, "save_strategy": "no"})
    assert len({len(pairs) for pairs in steps}) == 1
    ids = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for pairs in steps for p in pairs]
    trainer.train_dataset = Dataset.from_list(ids)
    trainer.train()
    return model


def trl_reference_free(
    kind: str, model: Any, output: Path, settings: Mapping[str, Any], pairs: Sequence[Pair]
) -> dict[str, Any]:
    """Loss and metrics of one batch by TRL's trainer of CPO (and SimPO) or of ORPO, and "gradients"."""
    import copy

    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    from tests.support.taught import untrained_folder

    make_config, make_trainer = (ORPOConfig, ORPOTrainer) if kind == "orpo" else (CPOConfig, CPOTrainer)
    common = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "remove_unused_columns": False}
    config = make_config(output_dir=str(output), max_length=512, **common, **settings)
    tokenizer = AutoTokenizer.from_pretrained(untrained_folder())
    tokenizer.pad_token_id = 0
    texts = Dataset.from_list([{"prompt": "Ada", "chosen": " Tom", "rejected": " Leo"}])
    model = copy.deepcopy(model).train()
    trainer = make_trainer(model, args=config, train_dataset=texts, processing_class=tokenizer)
    features = []
    for pair in pairs:
        feature = {}
        for side, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            ids = pair.prompt + answer
            feature |= {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids)}
            feature[f"{side}_labels"] = [-100] * len(pair.prompt) + answer
        features.append({**feature, "prompt_input_ids": pair.prompt, "prompt_attention_mask": [1] * len(pair.prompt)})
    loss, metrics = trainer.get_batch_loss_metrics(model, trainer.data_collator(features), train_eval="train")
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": float(loss), **metrics, "gradients": gradients}


def trl_dft(model: Any, output: Path, conversations: Sequence[tiny.Conversation]) -> dict[str, Any]:
    """Loss of one batch by TRL's SFTTrainer with DFT, and "gradients"."""
    import copy

    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from tests.support.taught import untrained_folder

    common = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "max_length": None}
    config = SFTConfig(output_dir=str(output), loss_type="dft", **common)
    tokenizer = AutoTokenizer.from_pretrained(untrained_folder())
    tokenizer.pad_token_id = 0
    model = copy.deepcopy(model).train()
    texts = Dataset.from_list([{"text": "Ada Tom"}])
    trainer = SFTTrainer(model, args=config, train_dataset=texts, processing_class=tokenizer)
    features = []
    for prompt, answer in conversations:
        ids = [*prompt.tolist(), *answer.tolist()]
        features.append({"input_ids": ids, "labels": [-100] * len(prompt) + answer.tolist()})
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(features))
    loss.backward()
    return {"loss": float(loss), "gradients": {name: parameter.grad for name, parameter in model.named_parameters()}}
