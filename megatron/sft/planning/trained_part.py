"""What a run trains, from its settings: all weights, all but the frozen ones, or adapters."""

import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from megatron.sft.checkpoint.adapter_record import read_lora_record
from megatron.sft.checkpoint.folder import Checkpoint
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.lora import LoRA, chosen_targets
from megatron.sft.families.trained import EMBEDDING, Trained, frozen_weights
from megatron.sft.hf.adapter_folder import AdapterFolder
from megatron.sft.planning.memory import num_parameters
from megatron.sft.planning.options import TrainOptions, variable_of
from megatron.sft.planning.trained_sizes import num_trained
from megatron.sft.runtime.errors import UserError

# Above this a learning rate is one for adapters, at or below it one for all weights.
_FULL_TUNING_LR = 5e-5


def trained_part(options: TrainOptions, architecture: Architecture, saved: LoRA | None = None) -> Trained:
    """What the settings train of this model. A setting without effect or sense is a `UserError`.

    saved: the adapters of a run that is resumed, for which the folder in LORA_INIT_FROM is not needed again.
    """
    lora = _lora(options, architecture, saved)
    if options.train_router != "auto" and architecture.moe is None:
        raise UserError(f"TRAIN_ROUTER={options.train_router}: {architecture.family} has no router: unset it")
    if not 0.0 <= options.moe_aux_loss < math.inf:
        raise UserError(f"MOE_AUX_LOSS={options.moe_aux_loss}: take 0 for none, or a weight such as 0.001")
    if options.moe_aux_loss and architecture.moe is None:
        raise UserError(f"MOE_AUX_LOSS={options.moe_aux_loss:g}: {architecture.family} has no experts: unset it")
    if lora is None:
        frozen = frozen_weights(architecture, options.freeze, options.train_router != "0")
        if options.train_router == "1" and any(".mlp.router." in name for name in frozen):
            raise UserError(f"TRAIN_ROUTER=1 and FREEZE={options.freeze!r}, which freezes a router: unset one of them")
        return Trained(None, frozen)
    if options.freeze:
        raise UserError(f"FREEZE={options.freeze!r} with LORA_RANK: adapters freeze the whole model: unset FREEZE")
    if options.train_router == "1":
        raise UserError("TRAIN_ROUTER=1 with LORA_RANK: with adapters the router stays frozen: unset it, or LORA_RANK=0")
    if options.optimizer_offload:
        raise UserError(
            f"OPTIMIZER_OFFLOAD={options.optimizer_offload:g} with LORA_RANK: the state of adapters is small, set it to 0"
        )
    return Trained(lora)


def _lora(options: TrainOptions, architecture: Architecture, saved: LoRA | None) -> LoRA | None:
    if not options.lora_rank and not options.lora_init_from:
        if idle := list(_idle_settings(options)):
            raise UserError(f"{', '.join(idle)} without LORA_RANK: set LORA_RANK (16, say) for adapters, or unset it")
        return None
    if options.lora_rank < 0:
        raise UserError(f"LORA_RANK={options.lora_rank}: take a rank such as 16, or 0 for full tuning")
    if not 0 <= options.lora_alpha < math.inf:
        raise UserError(f"LORA_ALPHA={options.lora_alpha}: take a number above 0, or 0 for twice LORA_RANK")
    if not 0.0 <= options.lora_dropout < 1.0:
        raise UserError(f"LORA_DROPOUT={options.lora_dropout}: take a probability from 0 up to, not including, 1")
    if not 0.0 < options.lora_plus < math.inf:
        raise UserError(f"LORA_PLUS={options.lora_plus}: take a factor above 0; 1 is plain LoRA")
    if options.lora_init_from:
        return _continued(options, architecture, saved or AdapterFolder(Path(options.lora_init_from)).lora(architecture))
    targets, experts = chosen_targets(architecture, options.lora_targets)
    alpha = options.lora_alpha or 2.0 * options.lora_rank
    return LoRA(options.lora_rank, alpha, targets, experts, options.lora_dropout, options.lora_scaling == "rslora")


def _continued(options: TrainOptions, architecture: Architecture, found: LoRA) -> LoRA:
    """The adapter that LORA_INIT_FROM names, whose rank, scale and targets the other settings must not contradict."""
    stated = {"LORA_RANK": (options.lora_rank, found.rank), "LORA_ALPHA": (options.lora_alpha, found.alpha)}
    if options.lora_targets != "all":
        stated["LORA_TARGETS"] = (chosen_targets(architecture, options.lora_targets), (found.targets, found.experts))  # type: ignore[assignment]
    if options.lora_scaling == "rslora":
        stated["LORA_SCALING"] = ("rslora", "rslora" if found.rslora else "alpha/r")  # type: ignore[assignment]
    for name, (asked, there) in stated.items():
        if asked and asked != there:
            raise UserError(f"{name} is {asked}, {options.lora_init_from} has {there}: unset {name} to take the adapter's")
    return LoRA(found.rank, found.alpha, found.targets, found.experts, options.lora_dropout, found.rslora)


def _idle_settings(options: TrainOptions) -> Iterator[str]:
    for setting in fields(TrainOptions):
        if setting.name.startswith("lora_") and getattr(options, setting.name) != setting.default:
            yield variable_of(setting)


def check_same_training(saved: Checkpoint, trained: Trained, architecture: Architecture) -> None:
    """A `UserError` where a run is resumed that trained something else: other weights, or adapters of another form."""
    before = _trained_before(saved, architecture)
    for variable, old, new in _differences(before, trained):
        advice = "set it back to resume, or start a new run in another OUTPUT_PATH"
        if before.lora is None and trained.lora is not None:
            advice = (
                "set it back to resume, or export the run, convert the export, and start a new one with it as "
                "PRETRAIN_CHECKPOINT_PATH in another OUTPUT_PATH (docs/lora.md)"
            )
        raise UserError(f"{variable} was {old} in {saved.path} and is {new} now: {advice}")


def _trained_before(saved: Checkpoint, architecture: Architecture) -> Trained:
    lora = read_lora_record(saved)
    options = saved.manifest.get("training", {}).get("options", {})
    router = options.get("train_router", "auto") != "0"
    return Trained(lora, frozenset() if lora else frozen_weights(architecture, options.get("freeze", ""), router))


def _differences(before: Trained, now: Trained) -> Iterator[tuple[str, object, object]]:
    """(variable, value before, value now) of what decides which numbers are trained, and what they mean."""
    old, new = before.lora, now.lora
    if old is None or new is None:
        if old != new:
            yield "LORA_RANK", old.rank if old else 0, new.rank if new else 0
        elif before.frozen != now.frozen:
            more, less = sorted(now.frozen - before.frozen), sorted(before.frozen - now.frozen)
            name = (more or less)[0]
            yield f"{name} (FREEZE, TRAIN_ROUTER)", *(("trained", "frozen") if more else ("frozen", "trained"))
        return
    for variable, ours in (("LORA_RANK", "rank"), ("LORA_ALPHA", "alpha")):
        if getattr(old, ours) != getattr(new, ours):
            yield variable, f"{getattr(old, ours):g}", f"{getattr(new, ours):g}"
    if old.rslora != new.rslora:
        scalings = ["rslora" if each.rslora else "alpha/r" for each in (old, new)]
        yield "LORA_SCALING", scalings[0], scalings[1]
    if (old.targets, old.experts) != (new.targets, new.experts):
        targets = [",".join([*each.targets, *["experts"] * each.experts]) for each in (old, new)]
        yield "LORA_TARGETS", targets[0], targets[1]


def describe(architecture: Architecture, trained: Trained) -> str:
    """One line for people."""
    lora = trained.lora
    count, whole = num_trained(architecture, trained), num_parameters(architecture)
    if lora is None:
        share = f": {count / 1e6:,.1f} M of {whole / 1e6:,.1f} M parameters ({100 * count / whole:.1f} %)"
        tied = architecture.tied_embeddings and EMBEDDING in trained.frozen
        head = " (the head among them: it is the embedding)" if tied else ""
        return f"all but {len(trained.frozen):,} frozen weights{head}{share}" if trained.frozen else "all weights"
    scale = f"alpha {lora.alpha:g}" + (" by the root of the rank" if lora.rslora else "")
    scale += f", dropout {lora.dropout:g}" if lora.dropout else ""
    left = "" if lora.experts or architecture.moe is None else "; not the experts (LORA_TARGETS=all,experts)"
    return (
        f"adapters of rank {lora.rank}, {scale}, on {', '.join(lora.targets)}{left}: {count / 1e6:,.1f} M of "
        f"{whole / 1e6:,.1f} M parameters ({100 * count / whole:.2f} %)"
    )


def lr_hint(options: TrainOptions, trained: Trained) -> str:
    """A hint where the learning rate is one for the other kind of training, else an empty string."""
    if trained.lora is not None and options.lr <= _FULL_TUNING_LR:
        return f"LR={options.lr:g} is a value for all weights; adapters mostly take 1e-4 or more"
    if trained.lora is None and options.lr > 2 * _FULL_TUNING_LR:
        return f"LR={options.lr:g} is a value for adapters; all weights mostly take 1e-5"
    return ""
