"""The loss curve of one run or several as a PNG, and a table that compares runs."""

import io
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron.sft.reporting.curves import Curve
from megatron.sft.runtime.manifest import write_bytes

COLOURS = ("#1f5fa8", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#0e7490")
DASHES = ("-", "--", "-.", (0, (1, 1)))  # of one colour's runs, once there are more runs than colours
# Pages show a picture at 400 to 800 pixels: few inches make large letters there.
SIZE_INCHES, DOTS_PER_INCH = (5.4, 3.6), 160
VALIDATION_COLOUR = "#c2410c"  # of a single run
SMOOTHING_SHARE = 1 / 25  # of the steps, in one mean
AXES = {"iteration": "iteration", "epoch": "epoch", "tokens": "tokens (million)"}


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours: as many on either side, fewer near both ends. Takes linear time."""
    reach = int(len(values) * SMOOTHING_SHARE / 2)
    sums = [0.0, *accumulate(values)]
    means = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        means.append((sums[index + near + 1] - sums[index - near]) / (2 * near + 1))
    return means


def draw(curves: Sequence[Curve], output: Path, title: str, axis: str = "iteration", by_source: bool = False) -> None:
    """Write the PNG: raw and smoothed losses, validation points, and the learning rate on the right-hand axis; below them the
    margins of pairs' rewards.

    axis: of AXES. by_source: with the smoothed loss of every source of the data.
    """
    from matplotlib.figure import Figure

    has_margins = any(curve.margins for curve in curves)
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes, *below = figure.subplots(1 + has_margins, sharex=True, squeeze=False, height_ratios=[2, 1][: 1 + has_margins])[:, 0]
    lr_axes = axes.twinx()
    if axis == "iteration":
        axes.xaxis.get_major_locator().set_params(integer=True)
    for index, curve in enumerate(curves):
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}
        _draw_run(axes, lr_axes, curve, style, len(curves) > 1, axis)
        if by_source:
            _draw_sources(axes, curve, index, len(curves), axis)
        if below:
            _draw_margins(below[0], curve, style, axis)
    _add_labels(axes, lr_axes, curves, title)
    if axis == "iteration" and len(curves) == 1:
        _add_epochs(axes, curves[0])
    (below or [axes])[-1].set_xlabel(AXES[axis])
    if below:
        below[0].set_ylabel("reward margin")
        below[0].grid(alpha=0.25)
    output.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=DOTS_PER_INCH, format="png")
    write_bytes(output, picture.getvalue())


def _draw_run(axes: Any, lr_axes: Any, curve: Curve, style: dict[str, Any], is_one_of_several: bool, axis: str) -> None:
    label = f"{curve.name}: loss" if is_one_of_several else "loss"
    raw_label = None if is_one_of_several else f"{label} (as logged)"
    x, colour = curve.x(axis), style["color"]
    means = smoothed(curve.losses)
    if int(len(curve.losses) * SMOOTHING_SHARE / 2) == 0:
        axes.plot(x, means, **style, linewidth=1.8, label=label)
    else:
        axes.plot(x, curve.losses, color=colour, alpha=0.3, linewidth=0.8, label=raw_label)
        axes.plot(x, means, **style, linewidth=1.8, label=f"{label} (smoothed)")
    if curve.validation_losses:
        validation = label.replace("loss", "validation loss")
        points = (curve.validation_x(axis), curve.validation_losses)
        own = colour if is_one_of_several else VALIDATION_COLOUR
        axes.plot(*points, "o-", color=own, markersize=4, linewidth=1.2, label=validation)
        _write_last(axes, points[0][-1], points[1][-1], own, above=points[1][-1] >= curve.losses[-1])
    ends_above = bool(curve.validation_losses) and final_loss(curve) > curve.validation_losses[-1]
    _write_last(axes, x[-1], final_loss(curve), colour, above=ends_above)
    lr_axes.plot(x, curve.lrs, color="grey" if not is_one_of_several else colour, alpha=0.5, linewidth=0.8, linestyle=":")


def _write_last(axes: Any, x: float, loss: float, colour: str, above: bool) -> None:
    """The number at the end of a curve, which an axis does not show."""
    vertical = {"xytext": (0, 6), "va": "bottom"} if above else {"xytext": (0, -6), "va": "top"}
    text = {"color": colour, "fontsize": "small", "fontweight": "bold", "ha": "right"}
    axes.annotate(f"{loss:.3g}", (x, loss), textcoords="offset points", **vertical, **text)


def _draw_sources(axes: Any, curve: Curve, run_index: int, num_runs: int, axis: str) -> None:
    x_of_iteration = dict(zip(curve.iterations, curve.x(axis), strict=True))
    for index, (name, points) in enumerate(curve.sources.items(), start=run_index + 1):
        x = [x_of_iteration[iteration] for iteration, _ in points]
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": "--"}
        label = f"{curve.name}: {name}" if num_runs > 1 else f"source {name}"
        axes.plot(x, smoothed([loss for _, loss in points]), **style, linewidth=1.2, label=label)


def _draw_margins(axes: Any, curve: Curve, style: dict[str, Any], axis: str) -> None:
    if len(curve.margins) != len(curve.iterations):  # another objective in a part of the run
        return
    axes.plot(curve.x(axis), curve.margins, color=style["color"], alpha=0.3, linewidth=0.8)
    axes.plot(curve.x(axis), smoothed(curve.margins), **style, linewidth=1.8)
    if len(curve.validation_margins) == len(curve.validation_iterations):
        points = (curve.validation_x(axis), curve.validation_margins)
        axes.plot(*points, "o", color=style["color"], markersize=6, markeredgecolor="black")


def _add_labels(axes: Any, lr_axes: Any, curves: Sequence[Curve], title: str) -> None:
    losses = [loss for curve in curves for loss in curve.losses + curve.validation_losses]
    if min(losses) > 0 and max(losses) / min(losses) > 20:  # a linear axis would show only the first steps
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda loss, place: f"{loss:g}")
        axes.yaxis.set_minor_formatter(lambda loss, place: f"{loss:g}" if f"{loss:e}"[0] in "235" else "")
        axes.tick_params(axis="y", which="minor", labelsize="small")
    axes.margins(y=0.1)
    axes.plot([], [], color="grey", linewidth=1.0, linestyle=":", label="learning rate (right)")
    axes.set_ylabel("loss per pair" if all(curve.margins for curve in curves) else "loss per trained token")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right", framealpha=0.9, fontsize="small", edgecolor="none")
    axes.set_zorder(lr_axes.get_zorder() + 1)  # losses and legend above the learning rate
    axes.patch.set_visible(False)
    lr_axes.set_ylabel("learning rate", color="grey")
    lr_axes.tick_params(colors="grey")
    lr_axes.set_ylim(bottom=0)
    lr_axes.yaxis.set_major_formatter(lambda rate, place: f"{rate:.1e}".replace("e-0", "e-") if rate else "0")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
        lr_axes.spines[side].set_visible(False)


def _add_epochs(axes: Any, curve: Curve) -> None:
    """A second axis, on top, with the epochs of the iterations."""
    epochs_a_step = curve.x("epoch")[-1] / curve.iterations[-1]
    if not epochs_a_step > 0:  # nan: of runs from before epochs were kept
        return
    ends = axes.secondary_xaxis("top", functions=(lambda x: x * epochs_a_step, lambda epoch: epoch / epochs_a_step))
    ends.tick_params(colors="grey", labelsize="small")
    ends.set_xlabel("epoch", color="grey", fontsize="small")
    ends.spines["top"].set_visible(False)


def title_of(curves: Sequence[Curve]) -> str:
    """A run's first and last loss and its steps; for several runs only their number."""
    if len(curves) > 1:
        return f"Loss of {len(curves)} runs"
    curve = curves[0]
    return f"{curve.name}: loss {curve.losses[0]:.3g} to {final_loss(curve):.3g} in {curve.iterations[-1]:,} steps"


def final_loss(curve: Curve) -> float:
    """The mean of the last tenth of the logged losses, 10 at most."""
    last = curve.losses[-max(1, min(10, len(curve.losses) // 10)) :]
    return sum(last) / len(last)


def comparison(curves: Sequence[Curve]) -> str:
    """The runs as a Markdown table, one a line."""
    lines = ["| run | steps | million tokens | loss at the end | best validation | tokens/s |", "|---|---|---|---|---|---|"]
    for curve in curves:
        best = f"{min(curve.validation_losses):.4f}" if curve.validation_losses else "-"
        speed = f"{curve.median_speed:,.0f}" if curve.median_speed else "-"
        tokens = f"{curve.x('tokens')[-1]:.2f}" if any(curve.tokens) else "-"
        name = curve.name.replace("|", "\\|")
        lines.append(f"| {name} | {curve.iterations[-1]:,} | {tokens} | {final_loss(curve):.4f} | {best} | {speed} |")
    return "\n".join(lines)
