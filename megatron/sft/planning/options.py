"""The settings of a training run: one table of shell variable, option, default and meaning."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from megatron.sft.runtime.errors import UserError

MODES = ("train", "resume", "reference")
OBJECTIVES = ("sft", "dft", "dpo", "simpo", "orpo", "cpo")
DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "sigmoid_norm", "robust", "cdpo", "exo", "nca", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop",
)  # fmt: skip
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# Asked for often enough to get advice instead of a list of what there is.
_OTHER_OBJECTIVES = {
    "kto": "KTO is not built: with a better and a worse answer to a question take OBJECTIVE=dpo with DPO_LOSS=bco_pair or "
    "apo_zero, which look at each answer by itself; with good answers alone, OBJECTIVE=sft",
    "rm": "reward models are not built: OBJECTIVE=dpo trains on the same pairs without one",
    "ppo": "reinforcement learning is not built: OBJECTIVE=dpo trains on pairs of answers",
}
_OTHER_OBJECTIVES |= {"reward": _OTHER_OBJECTIVES["rm"], "reward_model": _OTHER_OBJECTIVES["rm"]}
_OTHER_OBJECTIVES |= {"grpo": _OTHER_OBJECTIVES["ppo"], "rloo": _OTHER_OBJECTIVES["ppo"]}


def _setting(variable: str, meaning: str, default: Any = MISSING, choices: tuple[str, ...] = (), option: str = "") -> Any:
    metadata = {"variable": variable, "meaning": meaning, "choices": choices, "option": option}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainOptions:
    """Everything that a user can set of a run. Option names are Megatron-LM's, variable names the recipes'."""

    # fmt: off
    load: Path = _setting("PRETRAIN_CHECKPOINT_PATH", "converted model to start from (scripts/2_convert.sh)")
    data_path: Path = _setting("DATA_PATH", "tokenised data: prefix of the .bin/.idx/.json (scripts/3_tokenize.sh)")
    save: Path = _setting("OUTPUT_PATH", "folder of this run: checkpoints, metrics, a copy of the recipe")
    seq_length: int = _setting(
        "SEQ_LENGTH", "row length that the data must have been tokenised with; 0 takes the data's own", 0)

    tensor_parallel: int = _setting(
        "TENSOR_PARALLEL_SIZE", "processes that share each layer", 1, option="tensor-model-parallel-size")
    pipeline_parallel: int = _setting(
        "PIPELINE_PARALLEL_SIZE", "pipeline stages of layers", 1, option="pipeline-model-parallel-size")
    virtual_pipeline: int = _setting(
        "VIRTUAL_PIPELINE_SIZE", "parts of the model on each pipeline stage, interleaved so that stages wait less",
        1, option="num-virtual-stages-per-pipeline-rank")
    context_parallel: int = _setting(
        "CONTEXT_PARALLEL_SIZE", "processes that share each row", 1, option="context-parallel-size")
    expert_parallel: int = _setting(
        "EXPERT_PARALLEL_SIZE", "processes over which the experts of a layer are spread",
        1, option="expert-model-parallel-size")
    sequence_parallel: bool = _setting("SEQUENCE_PARALLEL", "split the norms over TP too (1 or 0)", False)

    micro_batch_size: int = _setting("MICRO_BATCH_SIZE", "rows a forward pass", 1)
    global_batch_size: int = _setting("GLOBAL_BATCH_SIZE", "rows an optimizer step, over all processes", 128)
    train_iters: int = _setting("TRAIN_ITERS", "optimizer steps; 0 computes them from EPOCHS", 0)
    epochs: float = _setting("EPOCHS", "passes over the training rows, where TRAIN_ITERS is 0", 1.0)
    split: str = _setting("SPLIT", "shares of the rows for training, validation and none, e.g. 999,1,0", "100,0,0")
    seed: int = _setting("SEED", "order of the rows, choice of validation rows", 1234)
    loss_average: str = _setting(
        "LOSS_AVERAGE", "what weighs the same in the loss: every trained token, or every conversation",
        "token", ("token", "conversation"))

    objective: str = _setting(
        "OBJECTIVE", "what is trained: answers, answers weighed by their own probability (dft), or pairs of a chosen and a "
        "rejected answer, with a reference (dpo) or without one", "sft", OBJECTIVES)
    dpo_loss: str = _setting("DPO_LOSS", "loss of a pair with OBJECTIVE=dpo (docs/preferences.md)", "sigmoid", DPO_LOSSES)
    dpo_beta: float = _setting(
        "DPO_BETA", "how strongly pairs hold the model to the reference: rewards are this times the log-ratios", 0.1)
    dpo_label_smoothing: float = _setting(
        "DPO_LABEL_SMOOTHING", "share of the pairs taken as wrongly ordered: for DPO_LOSS=robust, cdpo, exo, for simpo and cpo",
        0.0)
    dpo_f_divergence: str = _setting(
        "DPO_F_DIVERGENCE", "what holds the model to the reference", "reverse_kl", DIVERGENCES)
    dpo_f_alpha: float = _setting("DPO_F_ALPHA", "alpha of DPO_F_DIVERGENCE=alpha_divergence", 0.5)
    dpo_ld_alpha: float = _setting(
        "DPO_LD_ALPHA", "weight of an answer's tokens past the length of the pair's shorter answer", 1.0)
    dpo_discopop_tau: float = _setting("DPO_DISCOPOP_TAU", "temperature of DPO_LOSS=discopop", 0.05)
    simpo_gamma: float = _setting("SIMPO_GAMMA", "margin of the rewards that OBJECTIVE=simpo aims at", 0.5)
    sft_weight: float = _setting(
        "SFT_WEIGHT", "weight of the SFT loss of the chosen answers, added to the loss of the pairs; -1 takes the objective's "
        "own: 1 for orpo and cpo, 0 for dpo and simpo", -1.0)
    reference: str = _setting(
        "REFERENCE", "OBJECTIVE=dpo: the checkpoint that the model is held to, if not the one it starts from", "")
    reference_logps: str = _setting(
        "REFERENCE_LOGPS", "prefix of the .bin and .json with the reference's log-probabilities, which are made if missing; "
        "not set: next to the data", "")

    precision: str = _setting(
        "PRECISION", "of forward and backward; fp8 needs Transformer Engine", "bf16", ("bf16", "fp16", "fp8", "fp32"))
    fp8_recipe: str = _setting(
        "FP8_RECIPE", "scales of fp8: by a tensor's present values, those of its last 16 steps, or blocks of 128 (Hopper "
        "with CUDA 12.9 and Transformer Engine 2.3, or newer); experts have present ones by token and by channel of a weight, "
        "whatever it says", "tensorwise", ("tensorwise", "delayed", "blockwise"))
    initial_loss_scale: float = _setting("INITIAL_LOSS_SCALE", "first loss scale of fp16", 65536.0)
    loss_scale_window: float = _setting("LOSS_SCALE_WINDOW", "good steps after which fp16 doubles its loss scale", 1000.0)
    optimizer_precision: str = _setting(
        "OPTIMIZER_PRECISION", "of gradients and moments, where 8bit is of the moments alone and gradients are bf16; "
        "the master weights are float32 either way", "fp32", ("fp32", "bf16", "8bit"))
    optimizer_offload: float = _setting(
        "OPTIMIZER_OFFLOAD", "share of the optimizer's state that is kept in CPU memory, from 0 to 1", 0.0)
    lr: float = _setting("LR", "largest learning rate", 1e-05)
    min_lr: float = _setting("MIN_LR", "learning rate at the end", 1e-06)
    lr_decay_style: str = _setting(
        "LR_DECAY_STYLE", "shape of the learning rate after the warm-up",
        "cosine", ("cosine", "linear", "constant", "inverse-square-root", "WSD"))
    lr_warmup_iters: int = _setting("LR_WARMUP_ITERS", "steps of linear warm-up; -1 takes LR_WARMUP_FRACTION", -1)
    lr_warmup_fraction: float = _setting("LR_WARMUP_FRACTION", "share of the steps that warm up", 0.05)
    lr_wsd_decay_iters: int = _setting("LR_WSD_DECAY_ITERS", "steps of the final decay of WSD; 0 takes a tenth of all", 0)
    lr_wsd_decay_style: str = _setting(
        "LR_WSD_DECAY_STYLE", "shape of the final decay of WSD",
        "exponential", ("exponential", "linear", "cosine", "minus_sqrt"))
    weight_decay: float = _setting("WEIGHT_DECAY", "AdamW weight decay (not on norms and biases)", 0.1)
    adam_beta1: float = _setting("ADAM_BETA1", "AdamW first-moment decay", 0.9)
    adam_beta2: float = _setting("ADAM_BETA2", "AdamW second-moment decay", 0.95)
    adam_eps: float = _setting("ADAM_EPS", "AdamW epsilon", 1e-08)
    clip_grad: float = _setting("CLIP_GRAD", "largest gradient norm; 0 clips nothing", 1.0)
    recompute: str = _setting(
        "RECOMPUTE", "what is recomputed in the backward pass to save memory: nothing, norms and activation functions, "
        "whole layers, or the cheapest of these that fits", "none", ("none", "selective", "full", "auto"))
    recompute_layers: int = _setting(
        "RECOMPUTE_LAYERS", "layers of each pipeline stage, its first ones, that are recomputed whole, the others selectively: "
        "memory and time between RECOMPUTE=selective and full; RECOMPUTE=auto finds the fewest that fit", 0)

    lora_rank: int = _setting("LORA_RANK", "rank of the adapters (LoRA) that are trained; 0 trains the weights themselves", 0)
    lora_alpha: float = _setting("LORA_ALPHA", "scale of the adapters, divided by the rank; 0 takes twice the rank", 0.0)
    lora_dropout: float = _setting("LORA_DROPOUT", "share of the adapters' inputs that are set to 0 in training", 0.0)
    lora_targets: str = _setting(
        "LORA_TARGETS", "what gets adapters: all (attention and dense MLP), attention, mlp, experts, or names of Hugging "
        "Face's modules such as q_proj,v_proj; separate several with commas", "all")
    lora_scaling: str = _setting(
        "LORA_SCALING", "LORA_ALPHA divided by the rank, or by its square root", "alpha/r", ("alpha/r", "rslora"))
    lora_plus: float = _setting("LORA_PLUS", "factor of the learning rate of the adapters' B; 1 is plain LoRA", 1.0)
    lora_init_from: str = _setting("LORA_INIT_FROM", "PEFT folder of an adapter to continue, with its rank and targets", "")
    freeze: str = _setting(
        "FREEZE", "what is not trained: embedding, head, norms, attention, mlp, experts, shared_experts, router, layers 0-11, "
        "or a pattern of Hugging Face's names; separate several with commas", "")
    train_router: str = _setting(
        "TRAIN_ROUTER", "whether a mixture's router is trained; auto: with all weights, not with adapters",
        "auto", ("auto", "1", "0"))
    moe_aux_loss: float = _setting(
        "MOE_AUX_LOSS", "weight of a loss of unevenly loaded experts, on average over a mixture's layers; 0 is none", 0.0)

    gpu_memory_gib: float = _setting(
        "GPU_MEMORY_GIB", "memory of a GPU in GiB, for plan and RECOMPUTE=auto; 0 takes the GPU found", 0.0)
    tokens_per_second: float = _setting(
        "TOKENS_PER_SECOND", "speed of all processes together, for plan's estimate of the run time; 0 estimates it", 0.0)

    recipe: str = _setting("RECIPE", "file with these settings, copied next to the checkpoints; set by a recipe", "")
    log_interval: int = _setting("LOG_INTERVAL", "steps a log line", 1)
    save_interval: int = _setting("SAVE_INTERVALS", "steps a checkpoint; the last step is always saved", 1000)
    async_save: bool = _setting(
        "ASYNC_SAVE", "write checkpoints while training continues, from a copy in CPU memory (1 or 0)", True)
    keep_last: int = _setting("KEEP_LAST", "newest checkpoints to keep; 0 keeps all", 0)
    keep_every: int = _setting(
        "KEEP_EVERY", "iterations that this number divides are kept where KEEP_LAST removes others; 0: none", 0)
    verify_checkpoint: bool = _setting(
        "VERIFY_CHECKPOINT", "compare every file of a checkpoint with its checksum before loading it (1 or 0)", True)
    resume_with: str = _setting(
        "RESUME_WITH", "what may differ from the saved run, at the same position: data, tokenizer, seq_length, "
        "global_batch_size, seed, split, loss_average, objective, reference; separate several with commas", "")
    eval_interval: int = _setting("EVAL_INTERVAL", "steps between validations, where SPLIT has validation rows", 100)
    eval_iters: int = _setting("EVAL_ITERS", "global batches a validation; 0 takes all validation rows once", 0)
    validate_at_start: bool = _setting(
        "VALIDATE_AT_START", "validate before the first step too: a wrong template or tokenizer shows at once (1 or 0)", False)
    early_stop_patience: int = _setting(
        "EARLY_STOP_PATIENCE", "end the run after this many validations in a row without a lower loss; 0 never does", 0)
    loss_ceiling: float = _setting(
        "LOSS_CEILING", "end a run that has diverged, with status 2 and without saving it: its training loss stays above "
        "this; 0 sets none", 0.0)
    loss_ceiling_patience: int = _setting("LOSS_CEILING_PATIENCE", "steps in a row above LOSS_CEILING that end the run", 10)
    export_every: int = _setting(
        "EXPORT_EVERY", "steps between Hugging Face folders (PEFT folders of adapters) that are written to OUTPUT_PATH/exports "
        "while training continues; these steps are saved; 0 writes none", 0)
    on_nan: str = _setting(
        "ON_NAN", "what to do with a step whose loss or gradient is not finite: stop the run, or skip the step",
        "stop", ("stop", "skip"))
    max_skipped: int = _setting("MAX_SKIPPED", "steps of the whole run that ON_NAN=skip may skip", 10)
    exit_after_minutes: float = _setting(
        "EXIT_AFTER_MINUTES", "save and end with status 75 before this many minutes have passed since the script started; 0: "
        "unlimited", 0.0)
    watchdog_minutes: float = _setting(
        "WATCHDOG_MINUTES", "end a run that hangs in one part of a step for this long; 0 waits forever", 10.0)
    distributed_timeout_minutes: float = _setting(
        "DISTRIBUTED_TIMEOUT_MINUTES", "how long a process waits for the others; more than WATCHDOG_MINUTES", 15.0)
    # fmt: on


def variable_of(setting: "Field[Any]") -> str:
    """The shell variable of a setting."""
    return str(setting.metadata["variable"])


def variable_named(name: str) -> str:
    """The shell variable of the setting `name`."""
    return next(variable_of(setting) for setting in fields(TrainOptions) if setting.name == name)


def flag_of(setting: "Field[Any]") -> str:
    """The command-line option of a setting."""
    return "--" + (setting.metadata["option"] or setting.name.replace("_", "-"))


def options_record(options: "TrainOptions") -> dict[str, Any]:
    """The settings as JSON values, by their options' names: settings.json, checkpoint manifests, trackers."""
    names = {setting.name: flag_of(setting)[2:].replace("-", "_") for setting in fields(TrainOptions)}
    values = {name: getattr(options, field) for field, name in names.items()}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def options_of_record(record: Mapping[str, Any]) -> "TrainOptions":
    """The settings that `options_record` was made of. Those that it lacks, of a run of an older version, get their defaults."""
    values: dict[str, Any] = {}
    for setting in fields(TrainOptions):
        value = record.get(flag_of(setting)[2:].replace("-", "_"), setting.default)
        values[setting.name] = Path() if value is MISSING else Path(value) if setting.type is Path else value
    return TrainOptions(**values)


def parse(arguments: Sequence[str] | None = None) -> tuple[str, TrainOptions]:
    """The mode (`train`, `resume`, or an empty string: resume if there is a checkpoint, else train) and the settings.

    A `UserError` names the variable, not the option, since variables are what users type.
    """
    parser = _Parser(prog="train", description="Supervised fine-tuning with megatron-core.", allow_abbrev=False)
    parser.add_argument("mode", nargs="?", default="", choices=("", *MODES), metavar="train|resume|reference")
    for setting in fields(TrainOptions):
        kind = setting.type
        required = setting.default is MISSING
        meaning = f"{setting.metadata['meaning']} (variable {variable_of(setting)})".replace("%", "%%")
        parser.add_argument(
            flag_of(setting),
            dest=setting.name,
            type=_TYPES.get(setting.name, _flag if kind is bool else kind),
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


def _objective(text: str) -> str:
    if advice := _OTHER_OBJECTIVES.get(text.lower().replace("-", "_")):
        raise argparse.ArgumentTypeError(advice)
    return text


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither 1 nor 0")


def share(text: str) -> float:
    """From 0 to 1, for argparse; yes is 1 and no is 0."""
    if text.lower() in ("true", "yes", "on", "false", "no", "off", ""):
        return float(_flag(text))
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return number


_TYPES: dict[str, Any] = {"objective": _objective, "optimizer_offload": share}


def as_markdown() -> str:
    """docs/options.md."""
    lines = [
        "# Settings of a training run",
        "",
        "Set them as shell variables in a recipe (`scripts/sft/*.sh`, `scripts/dpo/*.sh`), in the environment, or with "
        "`sbatch --export`.",
        "This page is made by `python -m megatron.sft.options --markdown`.",
        "",
        "Not of a run but of the scripts: `GPUS_PER_NODE` (every GPU that is found; on the CPU TP x PP x CP processes),",
        "for several nodes `NNODES`, `NODE_RANK` and `MASTER_ADDR`, `MEGATRON_SFT_DEVICE=cpu`, `ASSETS_DIR`; in recipes",
        "`MODEL`, `DATA` and `MODEL_SIZE`. Trackers: `WANDB_API_KEY`, `SWANLAB_API_KEY`, `MLFLOW_TRACKING_URI`.",
        "`SAVE_INTERVAL` is another name of `SAVE_INTERVALS`.",
        "",
        "| variable | option | default | meaning |",
        "|---|---|---|---|",
    ]
    for setting in fields(TrainOptions):
        default = "needed" if setting.default is MISSING else f"`{shell_value(setting.default)}`"
        choices = "; one of " + ", ".join(setting.metadata["choices"]) if setting.metadata["choices"] else ""
        meaning = f"{setting.metadata['meaning']}{choices}"
        lines.append(f"| `{variable_of(setting)}` | `{flag_of(setting)}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def shell_value(value: Any) -> str:
    """A setting's value as it is written in a shell."""
    if isinstance(value, bool):
        return "1" if value else "0"
    return str(value) or '""'
