"""Where a run's metrics go besides metrics.jsonl: TensorBoard's event files, and Weights & Biases if it is asked for.

A failure of a tracker is reported once and does not stop the training: metrics.jsonl has all metrics anyway.
"""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron.sft.runtime import ranks
from megatron.sft.runtime.errors import cause_of, first_line
from megatron.sft.runtime.manifest import write_text

TENSORBOARD = "tensorboard"
RUN_ID = "wandb_run_id.txt"
INIT_SECONDS = 30  # how long Weights & Biases may take to answer

# Field of a line of metrics.jsonl to its name in the trackers.
_NAMES = {
    "loss": "train/loss",
    "validation_loss": "validation/loss",
    "lr": "train/learning rate",
    "grad_norm": "train/gradient norm",
    "epoch": "train/epoch",
    "skipped_steps": "train/skipped steps",
    "loss_scale": "train/loss scale",
    "seconds": "speed/seconds a step",
    "tokens_per_second": "speed/tokens a second",
    "tflops_per_process": "speed/TFLOPs per process",
    "mfu": "speed/MFU",
    "memory_bytes": "speed/peak memory (bytes)",
}


# Fields of pairs, whose names in the trackers are TRL's, below `train/` or `validation/`.
_PAIR_NAMES = ("rewards/", "logps/", "preference_loss", "sft_loss")


class Tracker(Protocol):
    """Takes lines of metrics.jsonl, as dicts."""

    def write(self, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def tracked_values(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by their names in the trackers."""
    tracked = {name: float(values[key]) for key, name in _NAMES.items() if values.get(key) is not None}
    kind = "validation" if "validation_loss" in values else "train"
    tracked |= {f"{kind}/{key}": float(value) for key, value in values.items() if key.startswith(_PAIR_NAMES)}
    sources = values.get("sources", {}).items()
    return tracked | {f"loss by source/{name}": float(source["loss"]) for name, source in sources}


class TensorBoard:
    """Event files. Steps from `first_iteration` on that an earlier process wrote are hidden."""

    def __init__(self, folder: Path, first_iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / TENSORBOARD), purge_step=first_iteration, flush_secs=20)

    def write(self, values: dict[str, Any]) -> None:
        for name, value in tracked_values(values).items():
            self._writer.add_scalar(name, value, values["iteration"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run of Weights & Biases, whose id is kept in the run's folder, so that a resumed run continues it.

    wandb reads its key from the environment; nothing here touches it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        init = partial(
            wandb.init,
            project=os.environ.get("WANDB_PROJECT", "megatron-sft"),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            id=run_id(folder),
            resume="allow",
            dir=str(folder),
            config=settings,
            settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_SECONDS),
        )
        try:
            self._run: Any = init()
        except Exception as error:  # a compute node without internet, an expired key
            reason = first_line(error)
            ranks.print_rank_0(f"note: Weights & Biases cannot be reached ({reason}): the run is kept offline")
            wandb.teardown()  # or the id would count as in use
            self._run = init(mode="offline")
        offline = bool(self._run.settings._offline)
        place = f"offline; upload it with `wandb sync {folder}/wandb/offline-*`" if offline else self._run.url
        ranks.print_rank_0(f"Weights & Biases: run {self._run.id}, {place}")

    def write(self, values: dict[str, Any]) -> None:
        # A resumed run repeats the steps that were not saved, with the same results: wandb has them already.
        if values["iteration"] >= self._run.step:
            self._run.log(tracked_values(values), step=values["iteration"])

    def close(self) -> None:
        self._run.finish()


def run_id(folder: Path) -> str:
    """The Weights & Biases id of the run in this folder, created by the first call."""
    path = folder / RUN_ID
    if not path.is_file():
        write_text(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()


class _Guarded:
    """Disables a tracker after its first failure, with one warning."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self._name = name
        self._tracker: Tracker | None = None
        with self._guard():
            self._tracker = make()

    def write(self, values: dict[str, Any]) -> None:
        with self._guard():
            if self._tracker:
                self._tracker.write(values)

    def close(self) -> None:
        with self._guard():
            if self._tracker:
                self._tracker.close()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._tracker = None
            message = f"warning: {self._name} is disabled ({cause_of(error)})"
            if isinstance(error, ImportError):
                package = error.name or self._name
                message = f"note: {self._name} is skipped, the package {package} is missing: pip install {package}"
            ranks.print_rank_0(message)


def wandb_wanted() -> bool:
    """Whether a key is set, or WANDB_MODE=offline."""
    mode = os.environ.get("WANDB_MODE", "online")
    return mode == "offline" or (mode != "disabled" and bool(os.environ.get("WANDB_API_KEY")))


def open_trackers(folder: Path, iteration: int, settings: dict[str, Any]) -> list[Tracker]:
    """The trackers of a run that continues after `iteration`; none on ranks other than 0. settings: for Weights & Biases."""
    if not ranks.is_rank_0():
        return []
    trackers: list[Tracker] = [_Guarded("TensorBoard", lambda: TensorBoard(folder, iteration + 1))]
    if wandb_wanted():
        trackers.append(_Guarded("Weights & Biases", lambda: WeightsAndBiases(folder, settings)))
    return trackers
