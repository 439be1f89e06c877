"""What an objective needs, and which of its settings go together; as in TRL 1.16 where it has them."""

from collections.abc import Iterator
from dataclasses import fields

from megatron.sft.data.tokenized import TokenizedRows
from megatron.sft.planning.options import TrainOptions, variable_named
from megatron.sft.runtime.errors import UserError

# Losses of the difference of the rewards alone, where what an f-divergence adds to both cancels.
F_DIVERGENCE_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo", "robust", "cdpo", "discopop")
SMOOTHED_LOSSES = ("robust", "cdpo", "exo")
# The settings that each OBJECTIVE reads.
_DPO = ("dpo_loss", "dpo_beta", "dpo_f_divergence", "dpo_ld_alpha", "sft_weight", "reference", "reference_logps")
_SETTINGS: dict[str, tuple[str, ...]] = {
    "sft": ("loss_average",),
    "dft": ("loss_average",),
    "dpo": _DPO,
    "simpo": ("dpo_beta", "dpo_label_smoothing", "simpo_gamma", "sft_weight"),
    "orpo": ("dpo_beta", "sft_weight"),
    "cpo": ("dpo_beta", "dpo_label_smoothing", "sft_weight"),
}
_ALL = ("dpo_label_smoothing", "dpo_f_alpha", "dpo_discopop_tau")
_OF_OBJECTIVES = {name for names in [*_SETTINGS.values(), _ALL] for name in names}
# Their own weight of the SFT part; the others have none.
_SFT_WEIGHTS = {"orpo": 1.0, "cpo": 1.0}


def needs_pairs(objective: str) -> bool:
    """Whether the objective is trained on pairs of answers."""
    return objective not in ("sft", "dft")


def needs_reference(objective: str) -> bool:
    """Whether the objective takes log-probabilities of a reference."""
    return objective == "dpo"


def sft_weight(options: TrainOptions) -> float:
    """SFT_WEIGHT, or the objective's own."""
    return options.sft_weight if options.sft_weight >= 0 else _SFT_WEIGHTS.get(options.objective, 0.0)


def settings_read(options: TrainOptions) -> tuple[str, ...]:
    """The names of the settings of objectives that this one, with its loss and divergence, reads."""
    names = _SETTINGS[options.objective]
    if options.objective != "dpo":
        return names
    names += ("dpo_label_smoothing",) if options.dpo_loss in SMOOTHED_LOSSES else ()
    names += ("dpo_discopop_tau",) if options.dpo_loss == "discopop" else ()
    return names + (("dpo_f_alpha",) if options.dpo_f_divergence == "alpha_divergence" else ())


def objective_words(options: TrainOptions) -> str:
    """The objective with all settings that it reads: `dpo, DPO_LOSS=sigmoid, DPO_BETA=0.1, …`; without places of files."""
    own = [name for name in settings_read(options) if not name.startswith(("reference", "loss_average"))]
    values = {name: sft_weight(options) if name == "sft_weight" else getattr(options, name) for name in own}
    return ", ".join([options.objective, *(f"{variable_named(name)}={value}" for name, value in values.items())])


def objective_problems(options: TrainOptions) -> Iterator[str]:
    """What is wrong with the settings of the objective by themselves."""
    read = settings_read(options)
    for setting in fields(TrainOptions):
        if setting.name in _OF_OBJECTIVES and setting.name not in read:
            value = getattr(options, setting.name)
            if value != setting.default:
                yield _unread(options, setting.name, value)
    if options.objective == "dpo" and options.lora_init_from and not options.reference:
        yield (
            "LORA_INIT_FROM with OBJECTIVE=dpo does not say what the reference is: set REFERENCE to PRETRAIN_CHECKPOINT_PATH "
            "for the model without the adapter, or to a checkpoint converted from an export with MERGE=1 for the model with it"
        )
    if options.dpo_beta <= 0:
        yield f"DPO_BETA={options.dpo_beta} must be above 0: TRL's default is 0.1"
    if not 0 <= options.dpo_ld_alpha <= 1:
        yield f"DPO_LD_ALPHA={options.dpo_ld_alpha} must lie between 0 and 1, which is without it"
    if options.sft_weight < 0 and options.sft_weight != -1:
        yield f"SFT_WEIGHT={options.sft_weight} must be at least 0, or -1 for the objective's own"
    if "dpo_label_smoothing" in read:
        yield from _smoothing_problems(options)
    if options.dpo_discopop_tau <= 0:
        yield f"DPO_DISCOPOP_TAU={options.dpo_discopop_tau} must be above 0: its paper recommends 0.05"
    if options.dpo_f_divergence != "reverse_kl" and options.dpo_loss not in F_DIVERGENCE_LOSSES:
        yield (
            f"DPO_F_DIVERGENCE={options.dpo_f_divergence} does not go with DPO_LOSS={options.dpo_loss}, which is not a loss of "
            f"the difference of the rewards: take reverse_kl, or one of {', '.join(F_DIVERGENCE_LOSSES)}"
        )


def _smoothing_problems(options: TrainOptions) -> Iterator[str]:
    share = options.dpo_label_smoothing
    if not 0 <= share < 0.5:
        yield f"DPO_LABEL_SMOOTHING={share} must be at least 0 and below 0.5"
    elif share == 0 and options.objective == "dpo" and options.dpo_loss == "exo":
        yield "DPO_LOSS=exo needs a DPO_LABEL_SMOOTHING above 0: its paper recommends 1e-3"


def _unread(options: TrainOptions, name: str, value: object) -> str:
    what = f"{variable_named(name)}={value} has no effect with OBJECTIVE={options.objective}"
    if options.objective == "dpo" and name == "dpo_label_smoothing":
        return (
            f"{what} and DPO_LOSS={options.dpo_loss}: leave it at 0, or take DPO_LOSS=cdpo, which is sigmoid with label "
            "smoothing, robust or exo"
        )
    if options.objective == "dpo" and name == "dpo_discopop_tau":
        return f"{what} and DPO_LOSS={options.dpo_loss}: unset it, or set DPO_LOSS=discopop"
    if options.objective == "dpo" and name == "dpo_f_alpha":
        return f"{what} and DPO_F_DIVERGENCE={options.dpo_f_divergence}: unset it, or set DPO_F_DIVERGENCE=alpha_divergence"
    return f"{what}: unset it, or set OBJECTIVE to one of {', '.join(_readers(name))}"


def _readers(name: str) -> list[str]:
    """The objectives that read a setting, all of those of OBJECTIVE=dpo counted."""
    return [objective for objective, names in _SETTINGS.items() if name in names or (objective == "dpo" and name in _ALL)]


def check_objective_fits(rows: TokenizedRows, options: TrainOptions) -> None:
    """Refuse an objective of pairs on data without them, and the other way round."""
    num_pairs = rows.num_pairs
    if needs_pairs(options.objective) and not num_pairs:
        raise UserError(
            f"OBJECTIVE={options.objective} needs pairs, and {rows.prefix} has none: run scripts/3_tokenize.sh on records with "
            "a chosen and a rejected answer, or take OBJECTIVE=sft"
        )
    if num_pairs and not needs_pairs(options.objective):
        raise UserError(
            f"{rows.prefix} holds {num_pairs} pairs, of which OBJECTIVE={options.objective} would train the rejected answers "
            'too: take OBJECTIVE=dpo, or run scripts/3_tokenize.sh with MAP_COLUMNS="chosen=messages rejected=-" (texts: '
            '"chosen=completion rejected=-") for the chosen answers alone'
        )
