"""A run's metrics step by step, read from its metrics.jsonl."""

import json
import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron.sft.runtime.errors import UserError

METRICS = "metrics.jsonl"
MARGINS = "rewards/margins"  # a field of its lines


@dataclass
class Curve:
    """One run's metrics at its logged iterations.

    tokens: of one step, there the mean since the last logged one. speeds: tokens a second, where logged. sources: (iteration,
    loss) by the name of the data source. validation_losses: without those that were not finite. margins, validation_margins: of
    the rewards of pairs, next to the losses; empty where there are none.
    """

    name: str
    iterations: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    epochs: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    sources: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    validation_iterations: list[int] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    validation_margins: list[float] = field(default_factory=list)

    def x(self, axis: str) -> list[float]:
        """The logged steps on an axis: `iteration`, `epoch`, or `tokens`, in millions since the beginning of the run."""
        if axis == "epoch":
            return self.epochs
        if axis == "tokens":
            steps = [now - before for before, now in zip([0, *self.iterations], self.iterations, strict=False)]
            return [total / 1e6 for total in accumulate(n * tokens for n, tokens in zip(steps, self.tokens, strict=True))]
        return [float(iteration) for iteration in self.iterations]

    def validation_x(self, axis: str) -> list[float]:
        """The validations on the same axis, each at the last step that was logged before it."""
        x = [0.0, *self.x(axis)]
        return [x[bisect_right(self.iterations, iteration)] for iteration in self.validation_iterations]

    @property
    def median_speed(self) -> float | None:
        """Tokens a second."""
        return statistics.median(self.speeds) if self.speeds else None


def read_curve(run_path: Path, name: str) -> Curve:
    """The curve of a run's folder or of its metrics.jsonl. A last line that is still being written is skipped.

    `UserError` if there is no such file, it is not metrics, or has no step yet.
    """
    path = run_path / METRICS if run_path.is_dir() else run_path
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a run's folder, which scripts/4_train.sh writes it to") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file: give training's metrics.jsonl") from None
    curve = Curve(name)
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            _add(curve, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}, line {number} is not metrics: give training's metrics.jsonl") from None
    if not curve.iterations:
        raise UserError(f"{path} has no training step yet: wait for the first log line")
    return curve


def _add(curve: Curve, values: dict[str, Any]) -> None:
    iteration = int(values["iteration"])
    if "validation_loss" in values:
        if values["validation_loss"] is not None:  # null where it was not finite
            curve.validation_iterations.append(iteration)
            curve.validation_losses.append(float(values["validation_loss"]))
            if MARGINS in values:
                curve.validation_margins.append(float(values[MARGINS]))
        return
    curve.losses.append(float(values["loss"]))
    curve.iterations.append(iteration)
    curve.lrs.append(float(values.get("lr", "nan")))
    curve.epochs.append(float(values.get("epoch", "nan")))
    curve.tokens.append(int(values.get("tokens", 0)))
    if MARGINS in values:
        curve.margins.append(float(values[MARGINS]))
    if "tokens_per_second" in values:
        curve.speeds.append(float(values["tokens_per_second"]))
    for name, source in values.get("sources", {}).items():
        curve.sources.setdefault(name, []).append((iteration, float(source["loss"])))


def run_names(paths: Sequence[Path]) -> list[str]:
    """Each run's folder name, with as many parent folders as distinguish the runs."""
    folders = [(path.parent if path.suffix == ".jsonl" else path).resolve() for path in paths]
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            break
    return names
