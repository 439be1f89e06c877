"""README.md of an exported model: what it was made from, with what data and recipe, and how training went."""

import json
from pathlib import Path
from typing import Any

from megatron.sft.checkpoint.folder import Checkpoint

CURVE = "loss.png"
_RECIPE = (
    "train_iters", "epochs", "global_batch_size", "micro_batch_size", "seq_length", "lr", "min_lr", "lr_decay_style",
    "lr_warmup_iters", "lr_warmup_fraction", "weight_decay", "clip_grad", "precision", "loss_average", "seed",
)  # fmt: skip


def find_curve(checkpoint: Checkpoint, run_folder: Path) -> Path | None:
    """The run's plot of its loss, if somebody drew it."""
    return next((p for p in (run_folder / CURVE, checkpoint.path.parent / CURVE) if p.exists()), None)


def model_card(checkpoint: Checkpoint, training: dict[str, Any], run_folder: Path, hf_dir: Path, curve: bool) -> str:
    """The page as Markdown, with the metadata block that model hubs read."""
    source = checkpoint.manifest.get("source", {})
    base = source.get("config", {}).get("_name_or_path") or Path(source.get("path", hf_dir)).name
    data, options = training.get("data", {}), training.get("options", {})
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", ""]
    lines += [f"# {base}, fine-tuned", "", f"Supervised fine-tuning of `{base}` with Megatron-SFT.", ""]
    lines += ["## Data", "", f"`{Path(str(data.get('prefix', 'unknown'))).name}`", ""]
    counts = {name: data[name] for name in ("rows", "conversations", "tokens", "trained_tokens") if name in data}
    lines += [f"- {name.replace('_', ' ')}: {value:,}" for name, value in counts.items()]
    lines += [f"- checksum (SHA-256): `{data['bin_sha256']}`"] if "bin_sha256" in data else []
    lines += ["", "## Training", "", f"- steps: {checkpoint.iteration:,} of {training.get('train_iters', 0):,}"]
    lines += [f"- rows seen: {training['consumed_rows']:,}"] if "consumed_rows" in training else []
    loss = _last_loss(checkpoint, run_folder)
    lines += [f"- loss at the last step: {loss:.4f}"] if loss is not None else []
    if options.get("recipe"):
        lines += [f"- recipe: `{Path(options['recipe']).name}`"]
    lines += ["", "| setting | value |", "|---|---|"]
    lines += [f"| {name.replace('_', '-')} | {options[name]} |" for name in _RECIPE if name in options]
    if curve:
        lines += ["", f"![loss]({CURVE})"]
    return "\n".join(lines) + "\n"


def _last_loss(checkpoint: Checkpoint, run_folder: Path) -> float | None:
    """The training loss that the run's metrics give for the checkpoint's step, or the nearest logged before it."""
    path = next(
        (p for p in (run_folder / "metrics.jsonl", checkpoint.path.parent / "metrics.jsonl") if p.exists()), None
    )
    if path is None:
        return None
    last = None
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a run that was cut off
        if "loss" in record and record.get("iteration", 0) <= checkpoint.iteration:
            last = float(record["loss"])
    return last
