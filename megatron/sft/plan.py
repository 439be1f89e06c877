"""Works a run out before it is queued, on any machine and without a GPU, and finds everything that would stop it.

bash scripts/sft/RECIPE.sh plan     (or scripts/4_train.sh plan with the settings as shell variables)
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.sft.hf.names import shown
from megatron.sft.planning.options import parse
from megatron.sft.planning.plan_text import name_without_effect, setting_lines, table
from megatron.sft.planning.planner import add_needs
from megatron.sft.planning.resolution import Line, Resolution, resolve
from megatron.sft.runtime.errors import run
from megatron.sft.training.same_run import check_same_run


def header_commands(recipe: Path, model: str) -> list[str]:
    """The commands that a recipe's head says to run before it; none where they are for another model."""
    head = recipe.read_text(encoding="utf-8").partition("# Before it")[2]
    block = head.partition("\n")[2].partition("\n#\n")[0]
    return [line.removeprefix("#").strip() for line in block.splitlines()] if model in block else []


def report(found: Resolution, settings: Sequence[Line]) -> str:
    """The plan for people: what follows, where the settings come from, what is wrong and what is to be done first."""
    recipe = found.options.recipe
    text = [f"plan of {recipe or 'the settings given'}"]
    if found.problems:
        text.append("this run cannot start:")
        text += [f"  {number}. {problem}" for number, problem in enumerate(found.problems, 1)]
    else:
        command = shlex.join(["bash", str(shown(Path(recipe or "scripts/4_train.sh"))), "resume" if found.resume else "train"])
        text.append(f"this run can {'continue' if found.resume else 'start'}: {command}")
    if found.to_do:
        model = found.options.load.name.partition("_Megatron_")[0]
        commands = header_commands(Path(recipe), model) if recipe else []
        text += ["do first:", *(f"  {command}" for command in commands or found.to_do)]
    text.append(table([*found.lines, ("output", str(found.options.save)), *settings]))
    return "\n".join(text)


def compare_with_saved(found: Resolution) -> None:
    """What a saved run does not allow to change is a problem, what has changed otherwise a line."""
    if not found.resume or found.start is None or found.problems:
        return
    for change in found.attempt(check_same_run, found.start, found.plan()) or []:
        found.add("changed", change.partition(": ")[2])


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    all_defaults = arguments[:1] == ["all"]
    arguments = arguments[all_defaults:]
    _, options = parse(arguments)
    found = resolve("", options, int(os.environ.get("PLANNED_PROCESSES", "1")))
    compare_with_saved(found)
    name_without_effect(found, os.environ)
    add_needs(found)
    exported = os.environ.get("SETTINGS_FROM_ENVIRONMENT", "").split()  # by scripts/4_train.sh
    print(report(found, setting_lines(options, arguments, exported, all_defaults)))
    return 2 if found.problems else 0


if __name__ == "__main__":
    run(main)
