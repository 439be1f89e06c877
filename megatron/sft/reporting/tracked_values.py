"""The numbers of a line of metrics.jsonl by the names that trackers show."""

from typing import Any

# Field of a line of metrics.jsonl to its name in the trackers.
_NAMES = {
    "loss": "train/loss",
    "validation_loss": "validation/loss",
    "lr": "train/learning rate",
    "grad_norm": "train/gradient norm",
    "epoch": "train/epoch",
    "skipped_steps": "train/skipped steps",
    "loss_scale": "train/loss scale",
    "expert_load": "train/most loaded expert over the mean",
    "expert_load_worst": "train/most loaded expert over the mean, worst layer",
    "moe_aux_loss": "train/load balance loss",
    "seconds": "speed/seconds a step",
    "tokens_per_second": "speed/tokens a second",
    "tflops_per_process": "speed/TFLOPs per process",
    "mfu": "speed/MFU",
    "memory_bytes": "speed/peak memory (bytes)",
}
# Fields of pairs, whose names in the trackers are TRL's, below `train/` or `validation/`.
_PAIR_NAMES = ("rewards/", "logps/", "preference_loss", "sft_loss")


def tracked_values(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by their names in the trackers."""
    tracked = {name: float(values[key]) for key, name in _NAMES.items() if values.get(key) is not None}
    kind = "validation" if "validation_loss" in values else "train"
    tracked |= {f"{kind}/{key}": float(value) for key, value in values.items() if key.startswith(_PAIR_NAMES)}
    sources = values.get("sources", {}).items()
    return tracked | {f"loss by source/{name}": float(source["loss"]) for name, source in sources}
