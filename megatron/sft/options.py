"""The settings of a training run: one table of shell variable, option, default and meaning.

`scripts/4_train.sh` reads the table with `python -m megatron.sft.options`, which prints `VARIABLE option` lines.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from megatron.sft.errors import UserError

MODES = ("train", "resume", "plan")


def _setting(variable: str, meaning: str, default: Any = MISSING, choices: tuple[str, ...] = ()) -> Any:
    metadata = {"variable": variable, "meaning": meaning, "choices": choices}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainOptions:
    """Everything that a user can set of a run. Option names are Megatron-LM's, variable names the recipes'."""

    load: Path = _setting("PRETRAIN_CHECKPOINT_PATH", "converted model to start from (scripts/2_convert.sh)")
    data_path: Path = _setting("DATA_PATH", "tokenised data: prefix of the .bin/.idx/.json (scripts/3_tokenize.sh)")
    save: Path = _setting("OUTPUT_PATH", "folder of this run: checkpoints, metrics, a copy of the recipe")
    seq_length: int = _setting(
        "SEQ_LENGTH", "row length that the data must have been tokenised with; 0 takes the data's", 0
    )

    tensor_model_parallel_size: int = _setting("TENSOR_PARALLEL_SIZE", "processes that share each layer", 1)
    pipeline_model_parallel_size: int = _setting("PIPELINE_PARALLEL_SIZE", "pipeline stages of layers", 1)
    context_parallel_size: int = _setting(
        "CONTEXT_PARALLEL_SIZE", "processes that share each row; only 1 works so far", 1
    )
    expert_model_parallel_size: int = _setting(
        "EXPERT_PARALLEL_SIZE", "processes over which a mixture's experts are spread", 1
    )
    sequence_parallel: bool = _setting("SEQUENCE_PARALLEL", "split norms over TP as well (1 or 0)", False)

    micro_batch_size: int = _setting("MICRO_BATCH_SIZE", "rows a forward pass", 1)
    global_batch_size: int = _setting("GLOBAL_BATCH_SIZE", "rows an optimizer step, over all processes", 128)
    train_iters: int = _setting("TRAIN_ITERS", "optimizer steps; 0 computes them from EPOCHS", 0)
    epochs: float = _setting("EPOCHS", "passes over the training rows, where TRAIN_ITERS is 0", 1.0)
    split: str = _setting("SPLIT", "shares of the rows for training, validation and none, e.g. 999,1,0", "100,0,0")
    seed: int = _setting("SEED", "order of the rows, choice of validation rows", 1234)
    loss_average: str = _setting(
        "LOSS_AVERAGE", "every trained token weighs the same, or every conversation", "token", ("token", "conversation")
    )

    precision: str = _setting("PRECISION", "of the weights in forward and backward", "bf16", ("bf16", "fp32"))
    lr: float = _setting("LR", "largest learning rate", 1e-5)
    min_lr: float = _setting("MIN_LR", "learning rate at the end", 1e-6)
    lr_decay_style: str = _setting(
        "LR_DECAY_STYLE",
        "shape of the learning rate after the warm-up",
        "cosine",
        ("cosine", "linear", "constant", "inverse-square-root", "WSD"),
    )
    lr_warmup_iters: int = _setting("LR_WARMUP_ITERS", "steps of linear warm-up; -1 takes LR_WARMUP_FRACTION", -1)
    lr_warmup_fraction: float = _setting("LR_WARMUP_FRACTION", "share of the steps that warm up", 0.05)
    lr_wsd_decay_iters: int = _setting(
        "LR_WSD_DECAY_ITERS", "steps of the final decay of WSD; 0 takes a tenth of all", 0
    )
    lr_wsd_decay_style: str = _setting(
        "LR_WSD_DECAY_STYLE",
        "shape of the final decay of WSD",
        "exponential",
        ("exponential", "linear", "cosine", "minus_sqrt"),
    )
    weight_decay: float = _setting("WEIGHT_DECAY", "AdamW weight decay (not on norms and biases)", 0.1)
    adam_beta1: float = _setting("ADAM_BETA1", "AdamW first-moment decay", 0.9)
    adam_beta2: float = _setting("ADAM_BETA2", "AdamW second-moment decay", 0.95)
    adam_eps: float = _setting("ADAM_EPS", "AdamW epsilon", 1e-8)
    clip_grad: float = _setting("CLIP_GRAD", "largest gradient norm; 0 clips nothing", 1.0)
    recompute: str = _setting(
        "RECOMPUTE", "activations computed again in the backward pass", "none", ("none", "selective", "full")
    )

    recipe: str = _setting("RECIPE", "file with these settings, copied beside the checkpoints; set by a recipe", "")
    log_interval: int = _setting("LOG_INTERVAL", "steps a log line", 1)
    save_interval: int = _setting("SAVE_INTERVALS", "steps a checkpoint; the last step is always saved", 1000)
    eval_interval: int = _setting("EVAL_INTERVAL", "steps between validations, where SPLIT has validation rows", 100)
    eval_iters: int = _setting("EVAL_ITERS", "global batches a validation; 0 takes all validation rows once", 0)
    distributed_timeout_minutes: float = _setting(
        "DISTRIBUTED_TIMEOUT_MINUTES", "how long a process waits for others", 10.0
    )


def variable_of(setting: "Field[Any]") -> str:
    """The shell variable of a setting."""
    return str(setting.metadata["variable"])


def flag_of(setting: "Field[Any]") -> str:
    """The command-line option of a setting."""
    return "--" + setting.name.replace("_", "-")


def parse(arguments: Sequence[str] | None = None) -> tuple[str, TrainOptions]:
    """The mode (`train`, `resume`, `plan`, or `` for the right one of the first two) and the settings."""
    parser = _Parser(prog="train", description="Supervised fine-tuning with megatron-core.", allow_abbrev=False)
    parser.add_argument("mode", nargs="?", default="", choices=("", *MODES), metavar="train|resume|plan")
    for setting in fields(TrainOptions):
        kind = setting.type
        required = setting.default is MISSING
        meaning = f"{setting.metadata['meaning']} (variable {variable_of(setting)})".replace("%", "%%")
        parser.add_argument(
            flag_of(setting),
            dest=setting.name,
            type=_flag if kind is bool else kind,
            default=None if required else setting.default,
            choices=setting.metadata["choices"] or None,
            help=meaning,
        )
    values = vars(parser.parse_args(arguments))
    mode = values.pop("mode")
    for setting in fields(TrainOptions):
        if values[setting.name] is None:
            raise UserError(f"{variable_of(setting)} is not set: it is the {setting.metadata['meaning']}")
    return mode, TrainOptions(**values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse speaks of options; the user typed variables.
        for setting in fields(TrainOptions):
            message = message.replace(f"argument {flag_of(setting)}:", f"{variable_of(setting)}:")
        raise UserError(f"{message} (docs/options.md lists the settings)")


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither 1 nor 0")


def as_markdown() -> str:
    """docs/options.md."""
    lines = [
        "# Settings of a training run",
        "",
        "Set them as shell variables in a recipe (`scripts/sft/*.sh`), in the environment, or with `sbatch --export`.",
        "This page is made by `python -m megatron.sft.options --markdown`.",
        "",
        "| variable | option | default | meaning |",
        "|---|---|---|---|",
    ]
    for setting in fields(TrainOptions):
        default = "needed" if setting.default is MISSING else f"`{_shell(setting.default)}`"
        choices = "; one of " + ", ".join(setting.metadata["choices"]) if setting.metadata["choices"] else ""
        meaning = f"{setting.metadata['meaning']}{choices}"
        lines.append(f"| `{variable_of(setting)}` | `{flag_of(setting)}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _shell(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return str(value) or '""'


if __name__ == "__main__":
    if sys.argv[1:] == ["--markdown"]:
        sys.stdout.write(as_markdown())
    else:
        for each in fields(TrainOptions):
            print(variable_of(each), flag_of(each))
