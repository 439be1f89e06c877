"""What a run leaves in its folder besides checkpoints and metrics, and what it says when nothing is left to do."""

import shlex
from pathlib import Path

from megatron.sft.checkpoint.folder import BEST, write_best
from megatron.sft.hf.names import shown
from megatron.sft.planning.options import options_record
from megatron.sft.planning.run_plan import RunPlan
from megatron.sft.runtime import console, ranks
from megatron.sft.runtime.manifest import write_bytes, write_json
from megatron.sft.training.steering.watch import Watch


def keep_settings(plan: RunPlan) -> None:
    """Copy the recipe and write settings.json, the resolved settings, into the folder of the run; on rank 0 only."""
    folder, recipe = plan.options.save, plan.options.recipe
    if not ranks.is_rank_0():
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if recipe:
            write_bytes(folder / Path(recipe).name, Path(recipe).read_bytes())
        write_json(folder / "settings.json", options_record(plan.options))
    except OSError as error:
        ranks.print_rank_0(f"warning: the settings are not kept in {folder} ({error.strerror}): training continues")


def name_best(plan: RunPlan, watch: Watch) -> None:
    """Name the best checkpoint as far as the run has come; on rank 0 only."""
    folder = plan.options.save
    if not ranks.is_rank_0():
        return
    try:
        if watch.best is not None and watch.best_loss is not None:
            write_best(folder, watch.best, watch.best_loss)
        else:
            (folder / BEST).unlink(missing_ok=True)  # of an earlier run in this folder
    except OSError as error:
        ranks.print_rank_0(f"warning: the best checkpoint is not named in {folder} ({error.strerror}): training continues")


def nothing_left(plan: RunPlan, watch: Watch, iteration: int) -> str:
    """Why nothing is left to do after `iteration` steps; empty if something is."""
    if iteration >= plan.train_iters:
        return (
            f"nothing to do: the run has {plan.train_iters} steps and iteration {iteration} is saved; a larger TRAIN_ITERS or "
            "EPOCHS continues it, with the learning rate that a run of that length has there"
        )
    if watch.gave_up(plan.options):
        return (
            f"nothing to do: the run ended early at iteration {iteration}, after {watch.since} validations without a lower "
            f"loss; an EARLY_STOP_PATIENCE above {watch.since} continues it"
        )
    return ""


def say_last_words(plan: RunPlan, watch: Watch, iteration: int) -> None:
    """What a finished run has written, and the command that comes next; on rank 0 only."""
    save, source = plan.options.save, plan.start.manifest.get("source", {}).get("path", "HF_DIR")
    early = f" (EARLY_STOP_PATIENCE: {watch.since} validations without a lower loss)" if iteration < plan.train_iters else ""
    command = ["bash", "scripts/5_export.sh", shown(save), shown(Path(source)), shown(save / "export")]
    lines = [f"done: {iteration} steps{early}, checkpoints in {shown(save)}"]
    if watch.best is not None:
        lines.append(f"best checkpoint: iteration {watch.best}, validation loss {watch.best_loss:.4f}")
        command += ["best"] * (watch.best != iteration)
    ranks.print_rank_0("\n".join(lines))
    if ranks.is_rank_0():
        console.say_next(f"next: {shlex.join(command)}")
