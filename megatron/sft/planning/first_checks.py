"""What can be wrong with a run's settings and paths, found before torch is imported, which takes seconds."""

import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from megatron.sft.checkpoint.folder import TRACKER, iterations, open_checkpoint
from megatron.sft.data.tokenized import TokenizedRows, data_file, data_prefix
from megatron.sft.hf.names import similar_folder
from megatron.sft.planning.options import TrainOptions, variable_named, variable_of
from megatron.sft.runtime.errors import UserError

LARGEST_SEED = 1 << 62  # as of scripts/3_tokenize.sh
# The least and the most of a setting by itself, and whether it may be the most.
_RANGES: dict[str, tuple[float, float, bool]] = {
    **dict.fromkeys(("micro_batch_size", "global_batch_size"), (1, math.inf, False)),
    **dict.fromkeys(("log_interval", "save_interval", "eval_interval"), (1, math.inf, False)),
    **dict.fromkeys(("loss_ceiling_patience", "initial_loss_scale", "loss_scale_window"), (1, math.inf, False)),
    **dict.fromkeys(("early_stop_patience", "loss_ceiling", "export_every", "keep_last", "keep_every"), (0, math.inf, False)),
    **dict.fromkeys(("seq_length", "eval_iters", "max_skipped", "lr_wsd_decay_iters"), (0, math.inf, False)),
    **dict.fromkeys(("weight_decay", "clip_grad", "adam_eps", "moe_aux_loss"), (0, math.inf, False)),
    **dict.fromkeys(("exit_after_minutes", "watchdog_minutes", "gpu_memory_gib", "tokens_per_second"), (0, math.inf, False)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 1, False)),
    "lr_warmup_fraction": (0, 1, True),
    "lr_warmup_iters": (-1, math.inf, False),
    "seed": (0, LARGEST_SEED, True),
}


def check_first(mode: str, options: TrainOptions) -> None:
    """The first of these mistakes, if there is one, is a `UserError`. mode: as of `resolution.resolve`."""
    problems = [*number_problems(options), *start_problems(mode, options), *data_problems(options)]
    if problems:
        raise UserError(problems[0])
    if not is_continued(mode, options):
        open_checkpoint(options.load)
    TokenizedRows(data_prefix(options.data_path))


def number_problems(options: TrainOptions) -> Iterator[str]:
    """What is wrong with the numbers by themselves, and between those of the optimizer."""
    for setting in (setting for setting in fields(options) if isinstance(setting.default, float)):
        value = getattr(options, setting.name)
        if not math.isfinite(value):
            yield f"{variable_of(setting)} is {value}: it must be a number"
    for name, (least, most, may_be_most) in _RANGES.items():
        value = getattr(options, name)
        if least <= value < most or (value == most and may_be_most) or not math.isfinite(value):
            continue
        below = "" if most == math.inf else f" and at most {most}" if may_be_most else f" and below {most}"
        yield f"{variable_named(name)} is {value}: it must be at least {least}{below}"
    if options.train_iters < 0 or (options.train_iters == 0 and not options.epochs > 0):
        yield f"TRAIN_ITERS={options.train_iters} and EPOCHS={options.epochs} give no steps: set one above 0"
    if math.isfinite(options.lr) and not 0 <= options.min_lr <= options.lr:
        yield f"MIN_LR={options.min_lr} must lie between 0 and LR={options.lr}"
    if not options.distributed_timeout_minutes > 0:
        yield f"DISTRIBUTED_TIMEOUT_MINUTES is {options.distributed_timeout_minutes}: it must be above 0"
    elif options.watchdog_minutes >= options.distributed_timeout_minutes:
        longer = f"make it more than WATCHDOG_MINUTES={options.watchdog_minutes:g}, so that a run that hangs can say where"
        yield f"DISTRIBUTED_TIMEOUT_MINUTES is {options.distributed_timeout_minutes:g}: {longer}"
    if options.adam_eps == 0:
        yield f"ADAM_EPS is {options.adam_eps}: it must be above 0"
    if problem := moments_problem(options.precision, options.optimizer_precision, options.optimizer_offload):
        yield problem


def moments_problem(precision: str, moments: str, offload: float) -> str:
    """What OPTIMIZER_PRECISION (`moments`) and OPTIMIZER_OFFLOAD do not go with; "" if nothing."""
    if moments != "fp32" and precision not in ("bf16", "fp8"):
        needs = f"OPTIMIZER_PRECISION={moments} needs PRECISION=bf16 or fp8, and PRECISION is {precision}"
        return f"{needs}: take OPTIMIZER_PRECISION=fp32"
    if offload and moments != "fp32":
        return f"OPTIMIZER_OFFLOAD={offload:g} needs OPTIMIZER_PRECISION=fp32, and it is {moments}: set one of them back"
    return ""


def can_count(options: TrainOptions) -> bool:
    """Whether the numbers by which rows are drawn and steps are counted can be used at all."""
    shares = options.epochs, options.lr_warmup_fraction
    return min(options.micro_batch_size, options.global_batch_size) > 0 <= options.seed and all(map(math.isfinite, shares))


def is_continued(mode: str, options: TrainOptions) -> bool:
    """Whether OUTPUT_PATH has checkpoints, whole or not, from which the run continues."""
    return mode != "reference" and (bool(iterations(options.save)) or (options.save / TRACKER).exists())


def start_problems(mode: str, options: TrainOptions) -> Iterator[str]:
    """What is wrong with where the run begins, as far as the folders' existence goes."""
    yield from _path_problems(options)
    there = is_continued(mode, options)
    if mode == "train" and there:
        newest = next(iter(iterations(options.save)), "unknown")
        yield (
            f"OUTPUT_PATH {options.save} already has checkpoints (iteration {newest}): "
            "resume continues that run (resume instead of train), or set another OUTPUT_PATH"
        )
    if mode == "resume" and not there:
        yield f"OUTPUT_PATH {options.save} has no checkpoint to resume from: say train to start the run"
    if mode != "resume" and not (options.save / TRACKER).exists() and not options.load.is_dir():
        near = similar_folder(options.load)
        yield f"PRETRAIN_CHECKPOINT_PATH {options.load} does not exist{near}: make it with scripts/2_convert.sh"


def _path_problems(options: TrainOptions) -> Iterator[str]:
    """What keeps a path from being what is meant, or OUTPUT_PATH from being a folder."""
    for name in ("load", "data_path", "save"):
        path: Path = getattr(options, name)
        if str(path).startswith("~"):
            yield f"{variable_named(name)} is '{path}', and in quotes bash leaves ~ as it is: write $HOME or the whole path"
    there = next(folder for folder in (options.save, *options.save.parents) if folder.exists() or folder == Path(folder.anchor))
    if there.exists() and not there.is_dir():
        yield f"OUTPUT_PATH {options.save}: {there} is a file, not a folder: set another OUTPUT_PATH"


def data_problems(options: TrainOptions) -> Iterator[str]:
    """Whether the data are there."""
    prefix = data_prefix(options.data_path)
    if options.data_path.is_file() and prefix == options.data_path:
        yield f"DATA_PATH {prefix} is a file, not the prefix of tokenised data: set what scripts/3_tokenize.sh prints for it"
    elif not data_file(prefix, "json").exists():
        yield f"DATA_PATH {prefix} does not exist: make it with scripts/3_tokenize.sh"
