"""Works a run out before it is queued, on any machine and without a GPU, and finds everything that would stop it.

bash scripts/sft/RECIPE.sh plan     (or scripts/4_train.sh plan with the settings as shell variables)
"""

import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megatron.sft.planning.options import TrainOptions, flag_of, parse, shell_value, variable_of
from megatron.sft.planning.planner import Line, Planner
from megatron.sft.runtime.errors import run


def setting_lines(options: TrainOptions, arguments: Sequence[str], exported: Sequence[str]) -> list[Line]:
    """Every setting with its value, grouped by where the value comes from: `exported` variables, the recipe, the default."""
    groups: dict[str, list[str]] = {"environment": [], "recipe" if options.recipe else "command": [], "defaults": []}
    from_environment, from_recipe, by_default = groups.values()
    for setting in fields(TrainOptions):
        name = variable_of(setting)
        text = f"{name}={shell_value(getattr(options, setting.name))}"
        if flag_of(setting) not in arguments:
            by_default.append(text)
        elif name in exported and name != "RECIPE":
            from_environment.append(text)
        else:
            from_recipe.append(text)
    return [(where, " ".join(group)) for where, group in groups.items() if group]


def header_commands(recipe: Path, model: str) -> list[str]:
    """The commands that a recipe's head says to run before it; none where they are for another model."""
    head = recipe.read_text(encoding="utf-8").partition("# Before it")[2]
    block = head.partition("\n")[2].partition("\n#\n")[0]
    return [line.removeprefix("#").strip() for line in block.splitlines()] if model in block else []


def report(planner: Planner, settings: list[Line]) -> str:
    """The plan for people: what follows, where the settings come from, what is wrong and what is to be done first."""
    recipe = planner.options.recipe
    lines = [*planner.lines, ("output", str(planner.options.save)), *settings]
    width = max(len(name) for name, _ in lines)
    text = [f"plan of {recipe or 'the settings given'}"]
    for name, value in lines:
        text += textwrap.wrap(
            f"{name:<{width}}  {value}",
            132,
            initial_indent="  ",
            subsequent_indent=" " * (width + 4),
            break_long_words=False,
            break_on_hyphens=False,
        )
    if planner.problems:
        text.append("this run cannot start:")
        text += [f"  {number}. {problem}" for number, problem in enumerate(planner.problems, 1)]
    if planner.to_do:
        model = planner.options.load.name.partition("_Megatron_")[0]
        commands = header_commands(Path(recipe), model) if recipe else []
        text += ["do first:", *(f"  {command}" for command in commands or planner.to_do)]
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> int:
    _, options = parse(argv)
    planner = Planner(options, int(os.environ.get("WORLD_SIZE", "1")))
    planner.work_out()
    exported = os.environ.get("SETTINGS_FROM_ENVIRONMENT", "").split()  # by scripts/4_train.sh
    print(report(planner, setting_lines(options, sys.argv, exported)))
    return 2 if planner.problems else 0


if __name__ == "__main__":
    run(main)
