"""A run with everything decided before it starts, and the rules by which the numbers follow from the settings."""

import glob
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron.sft.checkpoint import verification
from megatron.sft.checkpoint.folder import Checkpoint, open_checkpoint
from megatron.sft.data.row_order import split_rows
from megatron.sft.data.tokenized import TokenizedRows
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.registry import read_architecture
from megatron.sft.families.trained import Trained
from megatron.sft.hf.names import shown
from megatron.sft.model.layout import Layout
from megatron.sft.planning.first_checks import is_continued, start_problems
from megatron.sft.planning.options import TrainOptions
from megatron.sft.planning.reference_plan import ReferencePlan
from megatron.sft.runtime.errors import UserError


@dataclass(frozen=True)
class RunPlan:
    """A run with everything decided. Numbers of rows are indices into `rows`."""

    options: TrainOptions
    layout: Layout
    data_parallel: int
    architecture: Architecture
    start: Checkpoint
    resume: bool
    rows: TokenizedRows
    training_rows: np.ndarray  # [n] int64
    validation_rows: np.ndarray  # [m] int64
    train_iters: int
    warmup_iters: int
    wsd_decay_iters: int
    eval_iters: int
    reference: ReferencePlan | None = None  # where the objective needs one
    trained: Trained = Trained()
    base: Checkpoint | None = None  # the weights under the adapters

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of an optimizer step on each data-parallel rank."""
        return self.options.global_batch_size // (self.options.micro_batch_size * self.data_parallel)

    @property
    def seq_length(self) -> int:
        """The most tokens a row holds."""
        return int(self.rows.manifest["length"])


def layout_for(options: TrainOptions, architecture: Architecture | None) -> Layout:
    """The parallel sizes that the settings ask for, not yet checked against the model; `architecture` is None if not known."""
    layout = Layout(
        options.tensor_parallel,
        options.pipeline_parallel,
        options.context_parallel,
        options.sequence_parallel,
        options.expert_parallel,
        options.virtual_pipeline,
    )
    if architecture and architecture.moe and layout.tensor_parallel > 1:
        # megatron-core trains experts under TP with sequence parallelism only.
        return replace(layout, sequence_parallel=True)
    return layout


def steps(options: TrainOptions, num_training_rows: int, data_parallel: int) -> tuple[int, int]:
    """Optimizer steps of the run, and those of them that warm up."""
    per_pass = options.micro_batch_size * data_parallel
    if options.global_batch_size % per_pass:
        raise UserError(
            f"GLOBAL_BATCH_SIZE={options.global_batch_size} is not a multiple of MICRO_BATCH_SIZE={options.micro_batch_size} "
            f"x {data_parallel} data-parallel copies: take {-(-options.global_batch_size // per_pass) * per_pass}"
        )
    stages = options.pipeline_parallel
    if options.virtual_pipeline > 1 and options.global_batch_size // per_pass % stages:
        # megatron-core interleaves the micro-batches in groups of as many as there are stages.
        whole = per_pass * stages
        raise UserError(
            f"GLOBAL_BATCH_SIZE={options.global_batch_size} makes {options.global_batch_size // per_pass} micro-batches a "
            f"copy, with VIRTUAL_PIPELINE_SIZE={options.virtual_pipeline} they must be a multiple of "
            f"PP={stages}: take {-(-options.global_batch_size // whole) * whole}"
        )
    train_iters = options.train_iters or math.ceil(num_training_rows * options.epochs / options.global_batch_size)
    warmup_iters = options.lr_warmup_iters
    if warmup_iters < 0:
        warmup_iters = min(round(train_iters * options.lr_warmup_fraction), train_iters - 1)
    if warmup_iters >= train_iters:
        raise UserError(f"LR_WARMUP_ITERS={warmup_iters} must be less than the {train_iters} steps of the run")
    return train_iters, warmup_iters


def starting_point(mode: str, options: TrainOptions) -> tuple[bool, Checkpoint]:
    """Whether the run continues one in OUTPUT_PATH, and the checkpoint that it begins from."""
    if mode == "reference":
        return False, open_checkpoint(options.load)
    for problem in start_problems(mode, options):
        raise UserError(problem)
    if is_continued(mode, options):
        return True, verification.newest_checkpoint(options.save)
    return False, open_checkpoint(options.load)


def exported_model(checkpoint: Checkpoint) -> Path:
    """The Hugging Face folder that the checkpoint was converted from, for EXPORT_EVERY, which writes folders like it."""
    source = Path(str(checkpoint.manifest.get("source", {}).get("path", "")))
    if not (source / "config.json").is_file():
        raise UserError(
            f"EXPORT_EVERY needs the model that {checkpoint.path} was converted from, and {source} is not there: bring it "
            "back, or unset EXPORT_EVERY and export later with scripts/5_export.sh"
        )
    return source


def untokenized(prefix: Path, options: TrainOptions) -> str:
    """The command that makes tokenised data, with what the names of scripts/3_tokenize.sh say of its input."""
    model = options.load.name.partition("_Megatron_")[0]
    named = re.fullmatch(rf"Tokenized-(.+)-{re.escape(model)}-(\d+)_text_document", prefix.name)
    if not model or not named:
        return f"bash scripts/3_tokenize.sh TOKENIZER DATA {options.seq_length or 'LENGTH'}"
    data = next((path for path in sorted(prefix.parent.glob(f"{glob.escape(named[1])}.*"))), prefix.parent / f"{named[1]}.json")
    others = sorted(prefix.parent.glob(f"Tokenized-{glob.escape(named[1])}-{glob.escape(model)}-*_text_document.json"))
    there = f" (or DATA_PATH={others[0].with_suffix('')}, which is there, with its SEQ_LENGTH)" if others else ""
    command = ["bash", "scripts/3_tokenize.sh", shown(options.load.with_name(model)), shown(data), named[2]]
    return shlex.join(map(str, command)) + there


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """The model's architecture, from the configuration in the checkpoint's manifest."""
    config = checkpoint.manifest.get("source", {}).get("config")
    if config is None:
        raise UserError(f"{checkpoint.path} has no manifest.json with the model's configuration: convert it again")
    return read_architecture(config, str(checkpoint.path / "manifest.json"))


def check_data_fits(rows: TokenizedRows, options: TrainOptions, architecture: Architecture, source: dict[str, Any]) -> None:
    """Refuse data that is not for this model. `source`: what the checkpoint's manifest says of the Hugging Face folder."""
    length = rows.manifest["length"]
    if options.seq_length and options.seq_length != length:
        raise UserError(
            f"row length {length} in {rows.prefix}.json but SEQ_LENGTH={options.seq_length}: "
            "rerun scripts/3_tokenize.sh with that length, or set SEQ_LENGTH to the data's"
        )
    if length > architecture.max_positions:
        raise UserError(
            f"rows of {length} tokens in {rows.prefix}.json, the model has {architecture.max_positions} positions: "
            f"rerun scripts/3_tokenize.sh with a length of at most {architecture.max_positions}"
        )
    if rows.manifest["max_token_id"] >= architecture.vocab_size:
        raise UserError(
            f"token {rows.manifest['max_token_id']} in {rows.prefix}, the model's vocabulary has {architecture.vocab_size} "
            "rows: the data was tokenised with another model's tokenizer, rerun scripts/3_tokenize.sh"
        )
    facts = rows.manifest.get("tokenizer", {})
    used, own = rows.manifest.get("chat_template_sha256"), facts.get("chat_template_sha256")
    compared = {"tokenizer": (facts.get("sha256"), source.get("tokenizer_sha256"))}
    if used == own:  # else the data was made with another template on purpose, which goes into the export
        compared["chat template"] = (own, source.get("chat_template_sha256"))
    for what, (of_data, of_model) in compared.items():
        if of_data and of_model and of_data != of_model:
            raise UserError(
                f"{rows.prefix} was made with the {what} of {facts.get('path')} (checksum {of_data[:12]}…), the model's in "
                f"{source.get('path')} is another ({of_model[:12]}…): rerun scripts/3_tokenize.sh with {source.get('path')}"
            )


def validation_problems(options: TrainOptions, num_validation_rows: int) -> Iterator[str]:
    """Settings that need validation rows where there are none."""
    asked = {"VALIDATE_AT_START": options.validate_at_start, "EARLY_STOP_PATIENCE": options.early_stop_patience}
    if not num_validation_rows:
        for name in (name for name, value in asked.items() if value):
            yield f"{name} needs validation rows and SPLIT={options.split} leaves none: set SPLIT=99,1,0, or unset {name}"


def split(options: TrainOptions, continues_group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the training rows and of the validation rows."""
    if not re.fullmatch(r"\d+(\.\d+)?(,\d+(\.\d+)?){0,2}", options.split):
        raise UserError(f"SPLIT={options.split!r} is not up to three shares like 999,1,0")
    shares = [float(part) for part in options.split.split(",")] + [0.0, 0.0]
    if shares[0] <= 0:
        raise UserError(f"SPLIT={options.split!r} leaves no rows for training")
    total = sum(shares)
    return split_rows(len(continues_group), shares[0] / total, shares[1] / total, options.seed, continues_group)


def eval_iters(options: TrainOptions, num_validation_rows: int) -> int:
    """Global batches of a validation: EVAL_ITERS, at most once through the validation rows."""
    whole = math.ceil(num_validation_rows / options.global_batch_size)
    return min(options.eval_iters, whole) if options.eval_iters else whole
