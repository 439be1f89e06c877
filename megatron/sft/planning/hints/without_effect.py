"""Settings that have no effect, and variables that look like settings and are none. Both are named: bash accepts any name."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from megatron.sft.planning.options import TrainOptions, variable_of

# What other frameworks call a setting. Not here: names that scripts of this repository use for something else.
OTHER_NAMES = {
    "LEARNING_RATE": "LR", "MIN_LEARNING_RATE": "MIN_LR", "LR_SCHEDULER_TYPE": "LR_DECAY_STYLE",
    "LR_SCHEDULER": "LR_DECAY_STYLE",
    "EPOCH": "EPOCHS", "NUM_EPOCHS": "EPOCHS", "NUM_TRAIN_EPOCHS": "EPOCHS", "N_EPOCHS": "EPOCHS", "MAX_EPOCHS": "EPOCHS",
    "MAX_STEPS": "TRAIN_ITERS", "TRAIN_STEPS": "TRAIN_ITERS", "NUM_STEPS": "TRAIN_ITERS", "ITERS": "TRAIN_ITERS",
    "TRAIN_BATCH_SIZE": "GLOBAL_BATCH_SIZE", "GBS": "GLOBAL_BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS": "GLOBAL_BATCH_SIZE",
    "GRAD_ACCUM": "GLOBAL_BATCH_SIZE", "PER_DEVICE_TRAIN_BATCH_SIZE": "MICRO_BATCH_SIZE", "MBS": "MICRO_BATCH_SIZE",
    "BATCH_SIZE": "GLOBAL_BATCH_SIZE", "MAX_LENGTH": "SEQ_LENGTH", "MAX_SEQ_LENGTH": "SEQ_LENGTH", "MAX_SEQ_LEN": "SEQ_LENGTH",
    "SEQ_LEN": "SEQ_LENGTH", "CUTOFF_LEN": "SEQ_LENGTH", "SEQUENCE_LEN": "SEQ_LENGTH", "MODEL_MAX_LENGTH": "SEQ_LENGTH",
    "WARMUP_RATIO": "LR_WARMUP_FRACTION", "WARMUP_STEPS": "LR_WARMUP_ITERS", "WARMUP_ITERS": "LR_WARMUP_ITERS",
    "SAVE_STEPS": "SAVE_INTERVALS", "LOGGING_STEPS": "LOG_INTERVAL", "LOG_STEPS": "LOG_INTERVAL", "EVAL_STEPS": "EVAL_INTERVAL",
    "SAVE_TOTAL_LIMIT": "KEEP_LAST", "MAX_GRAD_NORM": "CLIP_GRAD", "GRADIENT_CLIPPING": "CLIP_GRAD",
    "GRADIENT_CHECKPOINTING": "RECOMPUTE", "RECOMPUTE_GRANULARITY": "RECOMPUTE",
    "RECOMPUTE_NUM_LAYERS": "RECOMPUTE_LAYERS", "BF16": "PRECISION", "FP16": "PRECISION",
    "TORCH_DTYPE": "PRECISION", "OUTPUT_DIR": "OUTPUT_PATH", "SAVE_PATH": "OUTPUT_PATH",
    "MODEL_PATH": "PRETRAIN_CHECKPOINT_PATH",
    "MODEL_NAME_OR_PATH": "PRETRAIN_CHECKPOINT_PATH", "LOAD": "PRETRAIN_CHECKPOINT_PATH", "DATASET": "DATA_PATH",
    "TP": "TENSOR_PARALLEL_SIZE", "PP": "PIPELINE_PARALLEL_SIZE", "CP": "CONTEXT_PARALLEL_SIZE", "EP": "EXPERT_PARALLEL_SIZE",
    "TP_SIZE": "TENSOR_PARALLEL_SIZE", "PP_SIZE": "PIPELINE_PARALLEL_SIZE", "CP_SIZE": "CONTEXT_PARALLEL_SIZE",
    "EP_SIZE": "EXPERT_PARALLEL_SIZE", "LORA_R": "LORA_RANK", "LORA_TARGET": "LORA_TARGETS", "TARGET_MODULES": "LORA_TARGETS",
    "NUM_GPUS": "GPUS_PER_NODE", "NPROC_PER_NODE": "GPUS_PER_NODE", "NUM_NODES": "NNODES",
    "EARLY_STOPPING_PATIENCE": "EARLY_STOP_PATIENCE", "VAL_SIZE": "SPLIT", "VAL_RATIO": "SPLIT",
}  # fmt: skip
# Of scripts and of the shell, although close to a setting's name.
_KNOWN = {
    "SAVE_INTERVAL", "MODEL_SIZE", "DATA_NAME", "GPUS_PER_NODE", "NNODES", "DATA", "MODEL", "SECONDS", "EPOCHSECONDS",
    "EPOCHREALTIME", "LORA",
}  # fmt: skip
_SHORTEST = 6  # letters of a name that may be a near miss


def without_effect(options: TrainOptions, num_validation_rows: int | None) -> dict[str, str]:
    """Variable of a setting to why it has no effect with the other settings."""
    reasons: dict[str, str] = {}

    def unless(condition: object, reason: str, *names: str) -> None:
        if not condition:
            reasons.update(dict.fromkeys(names, reason))

    unless(not options.train_iters, f"TRAIN_ITERS={options.train_iters} decides", "EPOCHS")
    unless(options.lr_warmup_iters < 0, f"LR_WARMUP_ITERS={options.lr_warmup_iters} decides", "LR_WARMUP_FRACTION")
    wsd = options.lr_decay_style == "WSD"
    unless(wsd, f"LR_DECAY_STYLE={options.lr_decay_style}", "LR_WSD_DECAY_ITERS", "LR_WSD_DECAY_STYLE")
    unless(options.lr_decay_style != "constant", "LR_DECAY_STYLE=constant", "MIN_LR")
    unless(options.keep_last, "KEEP_LAST=0 keeps all", "KEEP_EVERY")
    unless(options.on_nan == "skip", f"ON_NAN={options.on_nan}", "MAX_SKIPPED")
    unless(options.precision == "fp8", f"PRECISION={options.precision}", "FP8_RECIPE")
    unless(options.precision == "fp16", f"PRECISION={options.precision}", "INITIAL_LOSS_SCALE", "LOSS_SCALE_WINDOW")
    some_whole = f"RECOMPUTE_LAYERS={options.recompute_layers} recomputes the other layers selectively"
    unless(not options.recompute_layers or options.recompute != "none", some_whole, "RECOMPUTE")
    unless(options.loss_ceiling, "LOSS_CEILING=0", "LOSS_CEILING_PATIENCE")
    adapters = ("LORA_ALPHA", "LORA_DROPOUT", "LORA_TARGETS", "LORA_SCALING", "LORA_PLUS")
    unless(options.lora_rank or options.lora_init_from, "LORA_RANK=0 trains the weights themselves", *adapters)
    if num_validation_rows is not None:
        unless(num_validation_rows, f"SPLIT={options.split} leaves no validation rows", "EVAL_INTERVAL", "EVAL_ITERS")
    return reasons


def effect_notes(options: TrainOptions, given: Sequence[str], num_validation_rows: int | None) -> Iterator[str]:
    """A line for each variable in `given` (typed by the user, not by a recipe) that has no effect."""
    for name, reason in without_effect(options, num_validation_rows).items():
        if name in given:
            value: Any = next(getattr(options, each.name) for each in fields(options) if variable_of(each) == name)
            yield f"{name}={value} has no effect: {reason}"


def misspelled(names: Sequence[str]) -> Iterator[str]:
    """A line for each variable that is another framework's name of a setting, or two letters away from one."""
    settings = [variable_of(setting) for setting in fields(TrainOptions)]
    for name in sorted(set(names) - set(settings) - _KNOWN):
        meant = OTHER_NAMES.get(name) or (_near(name, settings) if len(name) >= _SHORTEST else None)
        if meant:
            yield f"{name} is not a setting and has no effect: did you mean {meant}?"


def _near(name: str, settings: Sequence[str]) -> str | None:
    most = 1 if len(name) < 2 * _SHORTEST else 2
    close = [(edits(name, setting), setting) for setting in settings if abs(len(name) - len(setting)) <= most]
    distance, setting = min(close, default=(most + 1, ""))
    return setting if distance <= most else None


def edits(one: str, other: str) -> int:
    """The fewest letters to insert, drop, change or swap with the next one that make `other` of `one` (Damerau, 1964)."""
    rows = [list(range(len(other) + 1))]
    for i, letter in enumerate(one, 1):
        row = [i]
        for j, wanted in enumerate(other, 1):
            row.append(min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (letter != wanted)))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                row[-1] = min(row[-1], rows[-2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]
