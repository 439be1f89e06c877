"""What can be wrong with a run's settings and paths, found before torch is imported, which takes seconds."""

from collections.abc import Iterator

from megatron.sft.checkpoint.folder import TRACKER, iterations, open_checkpoint
from megatron.sft.data.tokenized import TokenizedRows, data_file, data_prefix
from megatron.sft.hf.names import similar_folder
from megatron.sft.planning.options import TrainOptions, variable_named
from megatron.sft.runtime.errors import UserError


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
    sizes = ("tensor_parallel", "pipeline_parallel", "context_parallel", "expert_parallel", "virtual_pipeline")
    for name in (*sizes, "micro_batch_size", "global_batch_size", "log_interval", "save_interval", "eval_interval"):
        if getattr(options, name) < 1:
            yield f"{variable_named(name)} is {getattr(options, name)}: it must be at least 1"
    if options.train_iters < 0 or (options.train_iters == 0 and not options.epochs > 0):
        yield f"TRAIN_ITERS={options.train_iters} and EPOCHS={options.epochs} give no steps: set one above 0"
    if not 0 <= options.min_lr <= options.lr:
        yield f"MIN_LR={options.min_lr} must lie between 0 and LR={options.lr}"
    for name in ("early_stop_patience", "loss_ceiling", "export_every"):
        if getattr(options, name) < 0:
            yield f"{variable_named(name)} is {getattr(options, name)}: it must be 0 (off) or more"
    if options.loss_ceiling_patience < 1:
        yield f"LOSS_CEILING_PATIENCE is {options.loss_ceiling_patience}: it must be at least 1"
    yield from _optimizer_problems(options)


def _optimizer_problems(options: TrainOptions) -> Iterator[str]:
    """What is wrong with the optimizer's settings. nan is, too."""
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(options, name) < 1:
            yield f"{variable_named(name)} is {getattr(options, name)}: it must be at least 0 and less than 1"
    for name in ("weight_decay", "clip_grad"):
        if not getattr(options, name) >= 0:
            yield f"{variable_named(name)} is {getattr(options, name)}: it must be 0 (off) or more"
    if not options.adam_eps > 0:
        yield f"ADAM_EPS is {options.adam_eps}: it must be more than 0"
    for name in ("initial_loss_scale", "loss_scale_window"):
        if not getattr(options, name) >= 1:
            yield f"{variable_named(name)} is {getattr(options, name)}: it must be at least 1"
    if problem := moments_problem(options.precision, options.optimizer_precision, options.optimizer_offload):
        yield problem


def moments_problem(precision: str, moments: str, offload: float) -> str:
    """What OPTIMIZER_PRECISION (`moments`) and OPTIMIZER_OFFLOAD do not go with; "" if nothing."""
    if moments != "fp32" and precision not in ("bf16", "fp8"):
        return f"OPTIMIZER_PRECISION={moments} needs PRECISION=bf16 or fp8, and PRECISION is {precision}: take OPTIMIZER_PRECISION=fp32"
    if offload and moments != "fp32":
        return f"OPTIMIZER_OFFLOAD={offload:g} needs OPTIMIZER_PRECISION=fp32, and it is {moments}: set one of them back"
    return ""


def is_continued(mode: str, options: TrainOptions) -> bool:
    """Whether OUTPUT_PATH has checkpoints, whole or not, from which the run continues."""
    return mode != "reference" and (bool(iterations(options.save)) or (options.save / TRACKER).exists())


def start_problems(mode: str, options: TrainOptions) -> Iterator[str]:
    """What is wrong with where the run begins, as far as the folders' existence goes."""
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


def data_problems(options: TrainOptions) -> Iterator[str]:
    """Whether the data are there."""
    prefix = data_prefix(options.data_path)
    if not data_file(prefix, "json").exists():
        yield f"DATA_PATH {prefix} does not exist: make it with scripts/3_tokenize.sh"
