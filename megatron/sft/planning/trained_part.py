"""What a run trains, from its settings: all weights, all but the frozen ones, or adapters."""

from collections.abc import Iterator
from dataclasses import fields
from math import prod
from pathlib import Path

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.lora import LoRA, chosen_targets, factor_shapes
from megatron.sft.families.sizes import weight_shape
from megatron.sft.families.trained import Trained, frozen_weights
from megatron.sft.families.weight_names import weight_entries
from megatron.sft.hf.adapter_folder import AdapterFolder
from megatron.sft.planning.memory import num_parameters
from megatron.sft.planning.options import TrainOptions, variable_of
from megatron.sft.runtime.errors import UserError

# Above this a learning rate is one for adapters, at or below it one for all weights.
_FULL_TUNING_LR = 5e-5


def trained_part(options: TrainOptions, architecture: Architecture) -> Trained:
    """What the settings train of this model. A setting without effect or sense is a `UserError`."""
    lora = _lora(options, architecture)
    if options.train_router != "auto" and architecture.moe is None:
        raise UserError(f"TRAIN_ROUTER={options.train_router}: {architecture.family} has no router: leave it out")
    if lora is None:
        return Trained(None, frozen_weights(architecture, options.freeze, options.train_router != "0"))
    if options.freeze:
        raise UserError(f"FREEZE={options.freeze!r} with LORA_RANK: adapters freeze the whole model: leave FREEZE out")
    if options.train_router == "1":
        raise UserError("TRAIN_ROUTER=1 with LORA_RANK: beside adapters the router stays frozen: leave it out, or LORA_RANK=0")
    if options.optimizer_offload:
        raise UserError("OPTIMIZER_OFFLOAD=1 with LORA_RANK: the state of adapters is small, set it to 0")
    return Trained(lora)


def _lora(options: TrainOptions, architecture: Architecture) -> LoRA | None:
    if not options.lora_rank and not options.lora_init_from:
        if idle := list(_idle_settings(options)):
            raise UserError(f"{', '.join(idle)} without LORA_RANK: set LORA_RANK (16, say) for adapters, or leave it out")
        return None
    if options.lora_rank < 0:
        raise UserError(f"LORA_RANK={options.lora_rank}: take a rank such as 16, or 0 for full tuning")
    if options.lora_alpha < 0:
        raise UserError(f"LORA_ALPHA={options.lora_alpha}: take a number above 0, or 0 for twice LORA_RANK")
    if not 0.0 <= options.lora_dropout < 1.0:
        raise UserError(f"LORA_DROPOUT={options.lora_dropout}: take a probability from 0 up to, not including, 1")
    if options.lora_plus <= 0.0:
        raise UserError(f"LORA_PLUS={options.lora_plus}: take a factor above 0; 1 is plain LoRA")
    if options.lora_init_from:
        return _continued(options, architecture)
    targets, experts = chosen_targets(architecture, options.lora_targets)
    alpha = options.lora_alpha or 2.0 * options.lora_rank
    return LoRA(options.lora_rank, alpha, targets, experts, options.lora_dropout, options.lora_scaling == "rslora")


def _continued(options: TrainOptions, architecture: Architecture) -> LoRA:
    """The adapter that LORA_INIT_FROM names, whose rank, scale and targets the other settings must not contradict."""
    found = AdapterFolder(Path(options.lora_init_from)).lora(architecture)
    stated = {"LORA_RANK": (options.lora_rank, found.rank), "LORA_ALPHA": (options.lora_alpha, found.alpha)}
    if options.lora_targets != "all":
        stated["LORA_TARGETS"] = (chosen_targets(architecture, options.lora_targets), (found.targets, found.experts))  # type: ignore[assignment]
    if options.lora_scaling == "rslora":
        stated["LORA_SCALING"] = ("rslora", "rslora" if found.rslora else "alpha/r")  # type: ignore[assignment]
    for name, (asked, there) in stated.items():
        if asked and asked != there:
            raise UserError(f"{name} is {asked}, {options.lora_init_from} has {there}: leave {name} out to take the adapter's")
    return LoRA(found.rank, found.alpha, found.targets, found.experts, options.lora_dropout, found.rslora)


def _idle_settings(options: TrainOptions) -> Iterator[str]:
    for setting in fields(TrainOptions):
        if setting.name.startswith("lora_") and getattr(options, setting.name) != setting.default:
            yield variable_of(setting)


def num_trained(architecture: Architecture, trained: Trained) -> int:
    """Parameters of the whole model that are trained."""
    if trained.lora is not None:
        return sum(trained.lora.rank * (outputs + inputs) for _, outputs, inputs in factor_shapes(architecture, trained.lora))
    frozen = (entry for entry in weight_entries(architecture) if entry.megatron in trained.frozen)
    return num_parameters(architecture) - sum(prod(weight_shape(architecture, entry.rule)) for entry in frozen)


def describe(architecture: Architecture, trained: Trained) -> str:
    """One line for people."""
    lora = trained.lora
    count, whole = num_trained(architecture, trained), num_parameters(architecture)
    if lora is None:
        share = f": {count / 1e6:,.1f} M of {whole / 1e6:,.1f} M parameters ({100 * count / whole:.1f} %)"
        return f"all but {len(trained.frozen):,} frozen weights{share}" if trained.frozen else "all weights"
    scale = f"alpha {lora.alpha:g}" + (" by the root of the rank" if lora.rslora else "")
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
