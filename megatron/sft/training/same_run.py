"""Whether a run continues the run that was saved: with the same data, order and batches the position means the same rows.

What it trains is compared before processes start (planning/trained_part.py).
"""

from typing import Any

from megatron.sft.checkpoint.folder import TORCH_DIST, Checkpoint
from megatron.sft.planning.objective_checks import objective_words
from megatron.sft.planning.options import options_of_record, options_record, variable_named
from megatron.sft.planning.run_plan import RunPlan
from megatron.sft.runtime.errors import UserError

# What RESUME_WITH may name.
CHANGEABLE = ("data", "tokenizer", "seq_length", "global_batch_size", "seed", "split", "loss_average", "objective", "reference")
# Settings allowed to change; changes are reported because they affect results.
REPORTED_SETTINGS = (
    "precision", "lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "lr_warmup_fraction", "lr_wsd_decay_iters",
    "lr_wsd_decay_style", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad", "lora_dropout", "lora_plus",
    "lora_init_from", "moe_aux_loss", "optimizer_precision",
)  # fmt: skip


def data_record(plan: RunPlan) -> dict[str, Any]:
    """What the manifest of a checkpoint says of the data, for resuming and for an exported model's card."""
    data = plan.rows.manifest
    counts: dict[str, Any] = {
        name: data[name] for name in ("rows", "pairs", "conversations", "tokens", "trained_tokens") if name in data
    }
    tokenizer = data.get("tokenizer", {})
    return {
        "prefix": str(plan.rows.prefix),
        "bin_sha256": data["files"]["bin"]["sha256"],
        "idx_sha256": data["files"]["idx"]["sha256"],
        "length": plan.seq_length,
        "tokenizer_sha256": tokenizer.get("sha256"),
        "end_of_turn_ids": tokenizer.get("end_of_turn_ids", []),
        **counts,
    }


def reference_record(plan: RunPlan) -> dict[str, Any] | None:
    """What the manifest of a checkpoint says of the reference that the run is held to."""
    if plan.reference is None:
        return None
    return {name: plan.reference.wanted[name] for name in ("checkpoint", "precision")}


def check_same_run(checkpoint: Checkpoint, plan: RunPlan) -> list[str]:
    """A `UserError` for a checkpoint without training state, and for a change that makes the position in the data mean other
    rows, unless RESUME_WITH names it.

    Returns a line for each allowed change.
    """
    if checkpoint.format != TORCH_DIST or checkpoint.manifest.get("training") is None:
        raise UserError(f"{checkpoint.path} has no training state to resume from: start a new run with it (train)")
    allowed = allowed_changes(plan.options.resume_with)
    before, now = settings_record(checkpoint.manifest["training"]), settings_record(_training_now(plan))
    for name in CHANGEABLE:
        old, new = before[name], now[name]
        if None in (old, new) or old == new or name in allowed:
            continue
        raise UserError(
            f"{_title(name)} was {_short(old)} in {checkpoint.path} and is {_short(new)} now: set it back to resume, set "
            f"RESUME_WITH={name} to continue with the new one at the same position, or start a new run in another OUTPUT_PATH"
        )
    return _changes(checkpoint, plan, before, now)


def allowed_changes(text: str) -> set[str]:
    """The names in RESUME_WITH, separated by commas. An unknown name is a `UserError`."""
    names = {name.strip().lower().replace("-", "_") for name in text.split(",") if name.strip()}
    unknown = sorted(names - set(CHANGEABLE))
    if unknown:
        raise UserError(f"RESUME_WITH={text!r}: {unknown[0]!r} is not one of {', '.join(CHANGEABLE)}")
    return names


def _training_now(plan: RunPlan) -> dict[str, Any]:
    return {"options": options_record(plan.options), "data": data_record(plan), "reference": reference_record(plan)}


def settings_record(training: dict[str, Any]) -> dict[str, Any]:
    """The value of each name in CHANGEABLE, None if unknown. `training`: as in the manifest, with `options` and `data`."""
    data, options = training["data"], training["options"]
    record = {name: options.get(name) for name in CHANGEABLE}
    record["objective"] = objective_words(options_of_record(options))
    reference = training.get("reference")
    record["reference"] = (reference["checkpoint"]["sha256"],) if reference else None
    record["data"] = (data["bin_sha256"], data["idx_sha256"]) if "idx_sha256" in data else None
    return {**record, "tokenizer": data.get("tokenizer_sha256"), "seq_length": data.get("length")}


def _changes(checkpoint: Checkpoint, plan: RunPlan, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    old, new = checkpoint.manifest["training"]["options"], options_record(plan.options)
    changed = [
        f"{_title(name)} from {_short(before[name])} to {_short(now[name])}"
        for name in CHANGEABLE
        if None not in (before[name], now[name]) and before[name] != now[name]
    ]
    changed += [
        f"{_title(name)} from {old[name]} to {new[name]}" for name in REPORTED_SETTINGS if old.get(name, new[name]) != new[name]
    ]
    steps = checkpoint.manifest["training"].get("train_iters", plan.train_iters)
    if steps != plan.train_iters:
        changed.append(f"the number of steps from {steps} to {plan.train_iters}")
    return [f"changed since iteration {checkpoint.iteration}: {change}" for change in changed]


def _title(name: str) -> str:
    titles = {
        "data": "DATA_PATH's content",
        "reference": "the reference's content",
        "tokenizer": "the data's tokenizer",
        "seq_length": "the data's row length",
    }
    return titles.get(name) or variable_named(name)


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return f"checksum {value[0][:12]}…" + (f" (index {value[1][:12]}…)" if len(value) > 1 else "")
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
