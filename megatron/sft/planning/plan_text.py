"""What a plan and the start of a run say to people: settings by their origin, hints, and lines in two columns."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields

from megatron.sft.planning.hints.without_effect import effect_notes, misspelled
from megatron.sft.planning.options import TrainOptions, flag_of, shell_value, variable_of
from megatron.sft.planning.resolution import Line, Resolution

# Defaults that a reader asks for; all of them are in settings.json and in `plan all`.
USUAL = (
    *(
        "GLOBAL_BATCH_SIZE",
        "MICRO_BATCH_SIZE",
        "EPOCHS",
        "LR",
        "MIN_LR",
        "LR_DECAY_STYLE",
        "LR_WARMUP_FRACTION",
        "WEIGHT_DECAY",
    ),
    *(
        "CLIP_GRAD",
        "SEED",
        "PRECISION",
        "OPTIMIZER_PRECISION",
        "RECOMPUTE",
        "OBJECTIVE",
        "LORA_RANK",
        "SAVE_INTERVALS",
        "KEEP_LAST",
    ),
)


def setting_lines(
    options: TrainOptions, arguments: Sequence[str], exported: Sequence[str] = (), all_defaults: bool = False
) -> list[Line]:
    """The settings with their values, grouped by their origin: `exported` variables, the recipe or command, the default.
    Of defaults only the usual ones, unless `all_defaults`."""
    groups: dict[str, list[str]] = {"environment": [], "recipe" if options.recipe else "command": [], "defaults": []}
    from_environment, from_recipe, by_default = groups.values()
    num_defaults = 0
    for setting in fields(TrainOptions):
        name = variable_of(setting)
        text = f"{name}={shell_value(getattr(options, setting.name))}"
        if flag_of(setting) not in arguments:
            num_defaults += 1
            if all_defaults or name in USUAL:
                by_default.append(text)
        elif name in exported and name != "RECIPE":
            from_environment.append(text)
        else:
            from_recipe.append(text)
    if more := num_defaults - len(by_default):
        by_default.append(f"and {more} more (plan all)")
    return [(where, " ".join(group)) for where, group in groups.items() if group]


def name_without_effect(found: Resolution, environment: Mapping[str, str]) -> None:
    """Add a hint for each setting that the user typed without effect. environment: as scripts/4_train.sh leaves it."""
    exported = environment.get("SETTINGS_FROM_ENVIRONMENT", "").split()
    rows = None if found.validation_rows is None else len(found.validation_rows)
    notes = effect_notes(found.options, [name for name in exported if environment.get(name)], rows)
    for note in (*notes, *misspelled(environment.get("VARIABLES_SET", "").split())):
        found.add("hint", note)


def table(lines: Sequence[Line]) -> str:
    """Names and values in two columns, at most 120 characters wide."""
    width = max(len(name) for name, _ in lines)
    wrapped = [
        textwrap.fill(
            f"{name:<{width}}  {value}",
            120,
            initial_indent="  ",
            subsequent_indent=" " * (width + 4),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, value in lines
    ]
    return "\n".join(wrapped)
