"""Where a run's metrics go besides metrics.jsonl: TensorBoard's event files, and every other tracker that is asked for.

A tracker is a class with `write` and `close`; a line of `HOSTED` adds one. Its failure is reported once and does not stop the
training: metrics.jsonl has all metrics anyway.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron.sft.reporting.hosted_trackers import MLflow, SwanLab, WeightsAndBiases
from megatron.sft.reporting.tracked_values import tracked_values
from megatron.sft.runtime import ranks
from megatron.sft.runtime.errors import cause_of

TENSORBOARD = "tensorboard"


class Tracker(Protocol):
    """Takes lines of metrics.jsonl, as dicts."""

    def write(self, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Hosted(Protocol):
    """A tracker's class: asked for by its own variables, made from the run's folder, settings and iteration."""

    @staticmethod
    def wanted() -> bool: ...

    def __call__(self, folder: Path, settings: dict[str, Any], iteration: int) -> Tracker: ...


HOSTED: dict[str, Hosted] = {"Weights & Biases": WeightsAndBiases, "SwanLab": SwanLab, "MLflow": MLflow}


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


def open_trackers(folder: Path, iteration: int, settings: dict[str, Any]) -> list[Tracker]:
    """The trackers of a run that continues after `iteration`; none on ranks other than 0. settings: to show there."""
    if not ranks.is_rank_0():
        return []
    trackers: list[Tracker] = [_Guarded("TensorBoard", lambda: TensorBoard(folder, iteration + 1))]
    for name, hosted in HOSTED.items():
        if hosted.wanted():
            trackers.append(_Guarded(name, partial(hosted, folder, settings, iteration)))
    return trackers
