"""The loss curve of one run or several as a PNG, from metrics.jsonl. `tools/plot_loss RUN...` runs

python -m megatron.sft.plot outputs/checkpoints/RUN --output loss.png
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.sft.errors import OneLineParser, UserError, run

METRICS = "metrics.jsonl"
COLOURS = ("#1f5fa8", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#0e7490")
SIZE_INCHES, DOTS_PER_INCH = (9.0, 5.0), 120
SMOOTHING_SHARE = 1 / 25  # of the steps, in one mean


@dataclass
class Curve:
    """One run's figures by iteration."""

    name: str
    iterations: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    validation_iterations: list[int] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)


def read_curve(run_path: Path, name: str) -> Curve:
    """The curve of a run's folder or of its metrics.jsonl. A last line that is still being written is passed over."""
    path = run_path / METRICS if run_path.is_dir() else run_path
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a run's folder, which scripts/4_train.sh writes it to") from None
    curve = Curve(name)
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            _add(curve, json.loads(line))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}, line {number} is no line of metrics: give the file that training writes"
            ) from None
    if not curve.iterations:
        raise UserError(f"{path} has no training step yet: wait for the first log line")
    return curve


def _add(curve: Curve, values: dict[str, Any]) -> None:
    if "validation_loss" in values:
        curve.validation_iterations.append(int(values["iteration"]))
        curve.validation_losses.append(float(values["validation_loss"]))
    else:
        curve.iterations.append(int(values["iteration"]))
        curve.losses.append(float(values["loss"]))
        curve.lrs.append(float(values.get("lr", "nan")))


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours; fewer neighbours near both ends, the same number on either side."""
    reach = int(len(values) * SMOOTHING_SHARE / 2)
    means = []
    for place in range(len(values)):
        near = min(reach, place, len(values) - 1 - place)
        window = values[place - near : place + near + 1]
        means.append(sum(window) / len(window))
    return means


def draw(curves: Sequence[Curve], output: Path, title: str) -> None:
    """Write the PNG: raw and smoothed losses, validation points, and the learning rate on the right-hand axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=SIZE_INCHES, layout="constrained")
    lr_axes = axes.twinx()
    for curve, colour in zip(curves, _colours(len(curves)), strict=True):
        label = f"{curve.name}: loss" if len(curves) > 1 else "loss"
        raw_label = f"{label} (as logged)" if len(curves) == 1 else None
        axes.plot(curve.iterations, curve.losses, color=colour, alpha=0.3, linewidth=0.8, label=raw_label)
        axes.plot(curve.iterations, smoothed(curve.losses), color=colour, linewidth=1.8, label=f"{label} (smoothed)")
        if curve.validation_losses:
            validation = label.replace("loss", "validation loss")
            points = (curve.validation_iterations, curve.validation_losses)
            axes.plot(*points, "o", color=colour, markersize=6, markeredgecolor="black", label=validation)
        lr_axes.plot(curve.iterations, curve.lrs, color=colour, alpha=0.6, linewidth=1.0, linestyle=":")
    _dress(axes, lr_axes, curves, title)
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f".{output.name}.tmp")
    figure.savefig(beside, dpi=DOTS_PER_INCH, format="png")
    plt.close(figure)
    beside.replace(output)


def _colours(count: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(count)]


def _dress(axes: Any, lr_axes: Any, curves: Sequence[Curve], title: str) -> None:
    losses = [loss for curve in curves for loss in curve.losses + curve.validation_losses]
    if min(losses) > 0 and max(losses) / min(losses) > 20:
        axes.set_yscale("log")
    axes.plot([], [], color="grey", linewidth=1.0, linestyle=":", label="learning rate (right)")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss per trained token")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right", framealpha=0.9)
    axes.set_zorder(lr_axes.get_zorder() + 1)
    axes.patch.set_visible(False)
    lr_axes.set_ylabel("learning rate")
    lr_axes.set_ylim(bottom=0)
    lr_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def title_of(curves: Sequence[Curve]) -> str:
    """What a run came to; for several runs only their number."""
    if len(curves) > 1:
        return f"Loss of {len(curves)} runs"
    curve = curves[0]
    return (
        f"{curve.name}: loss {curve.losses[0]:.3g} to {smoothed(curve.losses[-10:])[-1]:.3g} "
        f"in {curve.iterations[-1]:,} steps"
    )


def run_names(paths: Sequence[Path]) -> list[str]:
    """Each run's folder name, with as much of the path before it as tells the runs apart."""
    folders = [(path.parent if path.suffix == ".jsonl" else path).resolve() for path in paths]
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            break
    return names


def main() -> None:
    parser = OneLineParser(prog="plot_loss", description="Loss curve of one run or several, as a PNG.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, or their metrics.jsonl")
    parser.add_argument("--output", type=Path, help="default loss.png in the first run's folder")
    parser.add_argument("--title")
    arguments = parser.parse_args()
    names = run_names(arguments.runs)
    curves = [read_curve(path, name) for path, name in zip(arguments.runs, names, strict=True)]
    first: Path = arguments.runs[0]
    output: Path = arguments.output or (first if first.is_dir() else first.parent) / "loss.png"
    draw(curves, output, arguments.title or title_of(curves))
    print(f"loss curve: {output}")


if __name__ == "__main__":
    run(main)
