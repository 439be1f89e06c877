"""Working a run out before anything starts, and collecting everything that would stop it.

`plan` and the start of a run print the same lines.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import numpy as np

from megatron.sft.checkpoint.adapter_record import read_lora_record, refuse_adapters
from megatron.sft.checkpoint.folder import TRACKER, Checkpoint
from megatron.sft.data.tokenized import TokenizedRows, data_prefix
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.trained import Trained
from megatron.sft.hf.published_configs import unconverted
from megatron.sft.model.layout import Layout, check_layout
from megatron.sft.planning.adapter_base import base_of
from megatron.sft.planning.first_checks import can_count, data_problems, number_problems, start_problems
from megatron.sft.planning.fitting.recomputing import recompute_problems
from megatron.sft.planning.hints.small_runs import run_notes
from megatron.sft.planning.memory import num_parameters
from megatron.sft.planning.objective_checks import check_objective_fits, needs_reference, objective_problems, objective_words
from megatron.sft.planning.options import TrainOptions
from megatron.sft.planning.reference_plan import ReferencePlan, check_made_here, plan_reference
from megatron.sft.planning.run_plan import (
    RunPlan,
    architecture_of,
    check_data_fits,
    eval_iters,
    exported_model,
    layout_for,
    split,
    starting_point,
    steps,
    untokenized,
    validation_problems,
)
from megatron.sft.planning.trained_part import check_same_training, describe, lr_hint, trained_part
from megatron.sft.planning.trained_sizes import num_trained
from megatron.sft.runtime import device
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import check_free_space

SMALLEST_OF_HINTS = 50_000_000  # parameters: smaller models are trained from the beginning, with larger rates
Result = TypeVar("Result")
Line = tuple[str, str]  # a name and its value, for people


@dataclass
class Resolution:
    """A run as far as it could be worked out.

    problems: what would stop it, in the order of a run's start. to_do: commands to run first. lines: what follows from the
    settings, for people. The other fields keep their defaults where a problem kept them from being known.
    """

    options: TrainOptions
    num_processes: int
    problems: list[str] = field(default_factory=list)
    to_do: list[str] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    start: Checkpoint | None = None
    resume: bool = False
    architecture: Architecture | None = None
    trained: Trained = Trained()
    base: Checkpoint | None = None
    layout: Layout = Layout()
    layout_fits: bool = True  # the model
    data_parallel: int = 0
    rows: TokenizedRows | None = None
    training_rows: np.ndarray | None = None
    validation_rows: np.ndarray | None = None
    train_iters: int = 0
    warmup_iters: int = 0
    reference: ReferencePlan | None = None

    @property
    def seq_length(self) -> int:
        """The most tokens a row holds, 0 if neither the data nor SEQ_LENGTH says it."""
        return int(self.rows.manifest["length"]) if self.rows is not None else self.options.seq_length

    def attempt(self, call: Callable[..., Result], *arguments: Any) -> Result | None:
        """The call's result, or None after a `UserError`, which becomes a problem."""
        try:
            return call(*arguments)
        except UserError as error:
            self.problems.append(str(error))
            return None

    def add(self, name: str, value: str) -> None:
        """Add a line."""
        self.lines.append((name, value))

    def plan(self) -> RunPlan:
        """The run, ready to start. The first problem, if there is one, is a `UserError`."""
        if self.problems:
            raise UserError(self.problems[0])
        assert self.architecture is not None and self.start is not None and self.rows is not None
        assert self.training_rows is not None and self.validation_rows is not None
        shared = {each.name: getattr(self, each.name) for each in fields(RunPlan) if hasattr(self, each.name)}
        decay = self.options.lr_wsd_decay_iters or max(1, self.train_iters // 10)
        return RunPlan(**shared, wsd_decay_iters=decay, eval_iters=eval_iters(self.options, len(self.validation_rows)))


def resolve(mode: str, options: TrainOptions, num_processes: int) -> Resolution:
    """Check the settings against each other, the checkpoint and the data, in the order of a run's start.

    mode: `train`, `resume`, `reference`, or an empty string for whichever of the first two OUTPUT_PATH calls for.
    """
    problems = [*number_problems(options), *objective_problems(options)]
    found = Resolution(options, num_processes, problems=problems)
    _resolve_model(found, mode)
    _resolve_processes(found)
    _resolve_data(found)
    _resolve_objective(found, mode)
    if can_count(options):
        _resolve_steps(found)
    _resolve_disk(found)
    return found


def plan_run(mode: str, options: TrainOptions, num_processes: int) -> RunPlan:
    """`resolve` where nothing may be wrong: the first problem is a `UserError`."""
    return resolve(mode, options, num_processes).plan()


def _resolve_model(found: Resolution, mode: str) -> None:
    options = found.options
    if not (options.save / TRACKER).exists() and not options.load.is_dir() and mode != "resume":
        known = found.attempt(unconverted, options.load)
        found.architecture, where, command = known or (None, "", "")
        found.problems += start_problems(mode, options)
        found.to_do.append(command)
        found.add("start", f"not there yet{f', sizes from {where}' if where else ''}")
    elif begin := found.attempt(starting_point, mode, options):
        found.resume, found.start = begin
        found.architecture = found.attempt(architecture_of, found.start)
        found.add("start", f"{'resume' if found.resume else 'train'} from {found.start.path}")
        if options.export_every:
            found.attempt(exported_model, found.start)
    if found.architecture:
        sizes = found.architecture
        found.add(
            "model",
            f"{sizes.family}, {sizes.num_layers} layers x {sizes.hidden_size}, vocabulary {sizes.vocab_size:,}, "
            f"{num_parameters(sizes) / 1e6:,.1f} M parameters",
        )
        _resolve_trained(found, sizes)


def _resolve_trained(found: Resolution, architecture: Architecture) -> None:
    saved = read_lora_record(found.start) if found.start and found.resume else None
    trained = found.attempt(trained_part, found.options, architecture, saved)
    if trained is None:
        return
    found.trained = trained
    found.add("trained", describe(architecture, trained))
    if num_parameters(architecture) >= SMALLEST_OF_HINTS and (hint := lr_hint(found.options, trained)):
        found.add("hint", hint)
    if found.start is None:
        return
    num_problems = len(found.problems)
    if found.resume:
        found.attempt(check_same_training, found.start, trained, architecture)
    elif trained.lora is None:
        found.attempt(refuse_adapters, found.start)
    if trained.lora is None or len(found.problems) > num_problems:
        return
    found.base = found.attempt(base_of, found.start, found.options, found.resume)
    if found.base and found.resume:
        found.add("base", str(found.base.path))


def _resolve_processes(found: Resolution) -> None:
    layout = layout_for(found.options, found.architecture)
    num_problems = len(found.problems)
    found.attempt(layout.check_sizes)
    if len(found.problems) > num_problems:
        found.layout_fits = False
        found.to_do.clear()
        return
    found.layout = layout
    found.data_parallel = found.attempt(layout.data_parallel, found.num_processes) or 0
    num_problems = len(found.problems)
    if found.architecture:
        found.attempt(check_layout, layout, found.architecture)
        found.layout_fits = len(found.problems) == num_problems
        if not found.layout_fits:
            found.to_do.clear()  # converting to this layout would be refused too
    known = found.architecture if found.layout_fits else None
    found.problems += recompute_problems(found.options, layout, known)
    found.add(
        "processes",
        f"{found.num_processes} = TP {layout.tensor_parallel} x PP {layout.pipeline_parallel} x CP "
        f"{layout.context_parallel} x DP {found.data_parallel or '?'} on {device.device_name()}",
    )
    if known and layout.pipeline_parallel > 1:
        found.add("layers a stage", ", ".join(map(str, layout.stage_layers(known))))


def _resolve_data(found: Resolution) -> None:
    prefix = data_prefix(found.options.data_path)
    if missing := list(data_problems(found.options)):
        found.problems += missing
        found.to_do.append(untokenized(prefix, found.options))
        found.add("data", "not there yet")
        return
    found.rows = found.attempt(TokenizedRows, prefix)
    if found.rows is None:
        return
    manifest = found.rows.manifest
    pairs = f" = {found.rows.num_pairs:,} pairs" if found.rows.num_pairs else ""
    found.add(
        "data",
        f"{prefix}: {len(found.rows):,} rows of up to {manifest['length']:,} tokens, {manifest['conversations']:,} "
        f"conversations{pairs}, {100 * manifest['trained_tokens'] / max(manifest['tokens'], 1):.1f} % of the tokens trained",
    )
    if found.architecture:
        source = found.start.manifest.get("source", {}) if found.start else {}
        found.attempt(check_data_fits, found.rows, found.options, found.architecture, source)


def _resolve_objective(found: Resolution, mode: str) -> None:
    options, rows, start = found.options, found.rows, found.start
    if options.objective != "sft":
        found.add("objective", objective_words(options))
    if mode == "reference" and not needs_reference(options.objective):
        found.problems.append(f"OBJECTIVE={options.objective} takes no reference: it is OBJECTIVE=dpo that does")
    if rows is None or start is None:
        return
    found.attempt(check_objective_fits, rows, options)
    if not needs_reference(options.objective) or not rows.num_pairs:
        return
    try:
        found.reference = plan_reference(options, rows, start, found.resume)
        if mode == "reference" and found.reference.logps:
            check_made_here(found.reference.logps, found.layout)
    except UserError as error:
        if mode != "reference":
            found.problems.append(str(error))
            return
        found.reference = found.attempt(plan_reference, options, rows, start, found.resume, True)
        found.add("replaced", str(error))
    if found.reference:
        found.add("reference", found.reference.words)


def _resolve_steps(found: Resolution) -> None:
    options, num_rows = found.options, 0
    if found.rows is not None and (parts := found.attempt(split, options, found.rows.continues_group)):
        found.training_rows, found.validation_rows = parts
        num_rows = len(parts[0])
        found.add("rows", f"{num_rows:,} for training, {len(parts[1]):,} for validation")
        found.problems += validation_problems(options, len(parts[1]))
    if not found.data_parallel or not (num_rows or options.train_iters):
        return
    counted = found.attempt(steps, options, num_rows, found.data_parallel)
    if counted is None:
        return
    found.train_iters, found.warmup_iters = counted
    source = "TRAIN_ITERS" if options.train_iters else f"EPOCHS={options.epochs:g}"
    epochs = f", {found.train_iters * options.global_batch_size / num_rows:.2f} epochs" if num_rows else ""
    found.add("steps", f"{found.train_iters:,} ({source}{epochs}), of them {found.warmup_iters:,} of warm-up")
    micro_batches = options.global_batch_size // (options.micro_batch_size * found.data_parallel)
    found.add(
        "a step",
        f"{options.global_batch_size} rows{_conversations(found)} = {micro_batches} micro-batch{'es' * (micro_batches > 1)} of "
        f"{options.micro_batch_size} on each of {found.data_parallel} data-parallel copies",
    )
    if found.training_rows is not None and found.validation_rows is not None:
        for note in run_notes(options, (num_rows, len(found.validation_rows)), found.train_iters, found.data_parallel):
            found.add("hint", note)


def _conversations(found: Resolution) -> str:
    """About how many conversations a step has, in words."""
    if found.rows is None:
        return ""
    number = found.options.global_batch_size * found.rows.manifest["conversations"] / len(found.rows)
    return f" (about {number:,.0f} conversations)"


def _resolve_disk(found: Resolution) -> None:
    """A run that cannot write its first checkpoint is not started."""
    done = found.start.iteration if found.start and found.resume else 0
    if found.architecture and found.train_iters > done:
        size = checkpoint_bytes(found.options, found.architecture, found.trained)
        found.attempt(check_free_space, found.options.save, size, "a checkpoint of this run")


def checkpoint_bytes(options: TrainOptions, architecture: Architecture, trained: Trained) -> int:
    """What a checkpoint takes on disk: the weights (or adapters alone), and float32 weights and moments of what is trained."""
    of_weight = 4 if options.precision == "fp32" else 2
    num_weights = num_parameters(architecture) if trained.lora is None else num_trained(architecture, trained)
    return num_weights * of_weight + num_trained(architecture, trained) * 12
