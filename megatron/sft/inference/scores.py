"""Scores of models side by side: a table as Markdown and as a PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOOD, BAD, BAR, HEAD = "#15803d", "#b91c1c", "#cfe0f3", "#1f3a5f"


@dataclass(frozen=True)
class Score:
    """One figure of one model. error: its standard error, where there is one. higher_is_better: None where nobody says."""

    task: str
    metric: str
    value: float
    error: float | None = None
    higher_is_better: bool | None = True

    @property
    def is_share(self) -> bool:
        """Between 0 and 1, to be shown in per cent."""
        return 0 <= self.value <= 1 and self.higher_is_better is not False

    @property
    def text(self) -> str:
        if not self.is_share:
            return f"{self.value:.4g}"
        error = f" ± {100 * self.error:.1f}" if self.error else ""
        return f"{100 * self.value:.1f}{error} %"


@dataclass(frozen=True)
class Row:
    """One line of the table; a model without the figure has None."""

    task: str
    metric: str
    scores: tuple[Score | None, ...]

    @property
    def change(self) -> float | None:
        """From the first model to the last."""
        first, last = self.scores[0], self.scores[-1]
        return None if first is None or last is None else last.value - first.value

    @property
    def change_text(self) -> str:
        if self.change is None:
            return ""
        known = [score for score in self.scores if score]
        return f"{100 * self.change:+.1f}" if all(score.is_share for score in known) else f"{self.change:+.4g}"

    @property
    def is_better(self) -> bool | None:
        """None where nothing changed or nobody says which way is better."""
        direction = next((score.higher_is_better for score in self.scores if score), None)
        return None if not self.change or direction is None else (self.change > 0) == direction


def rows_of(scores: Sequence[Sequence[Score]]) -> list[Row]:
    """Rows in the order in which the models' scores come first."""
    by_key = [{(score.task, score.metric): score for score in each} for each in scores]
    keys = dict.fromkeys(key for each in by_key for key in each)
    return [Row(*key, tuple(each.get(key) for each in by_key)) for key in keys]


def header(models: Sequence[str]) -> list[str]:
    return ["task", "metric", *models, *(["change"] if len(models) > 1 else [])]


def cells(row: Row) -> list[str]:
    values = ["-" if score is None else score.text for score in row.scores]
    return [row.task, row.metric, *values, *([row.change_text] if len(row.scores) > 1 else [])]


def markdown(models: Sequence[str], rows: Sequence[Row]) -> str:
    """Shares are per cent, with their standard error; changes of them are percentage points."""
    lines = [header(models), ["---"] * 2 + ["---:"] * (len(header(models)) - 2), *map(cells, rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def draw(models: Sequence[str], rows: Sequence[Row], output: Path) -> None:
    """The table as a PNG, with a bar behind every share."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    table = [header(models), *map(cells, rows)]
    widths = [max(0.09 * max(len(line[column]) for line in table) + 0.35, 0.9) for column in range(len(table[0]))]
    lefts = [sum(widths[:column]) for column in range(len(widths))]
    height = 0.34
    figure = plt.figure(figsize=(sum(widths), height * len(table) + 0.1))
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, sum(widths))
    axes.set_ylim(height * len(table), -0.1)
    axes.axis("off")
    axes.axhspan(-0.1, height, color=HEAD)
    for number, line in enumerate(table):
        middle = height * (number + 0.5)
        for column, (text, left, width) in enumerate(zip(line, lefts, widths, strict=True)):
            if number:
                _bar(axes, rows[number - 1], column, left, width, height * number, height)
            colour = "white" if number == 0 else _colour(rows[number - 1], column, len(line))
            place, align = (left + 0.12, "left") if column < 2 else (left + width - 0.12, "right")
            weight = "bold" if number == 0 else "normal"
            axes.text(place, middle, text, ha=align, va="center", color=colour, fontsize=10, weight=weight)
        axes.axhline(height * (number + 1), color="#c8ced6", linewidth=0.6)
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f".{output.name}.tmp")
    figure.savefig(beside, dpi=150, format="png")
    plt.close(figure)
    beside.replace(output)


def _bar(axes: Any, row: Row, column: int, left: float, width: float, top: float, height: float) -> None:
    score = row.scores[column - 2] if 2 <= column < 2 + len(row.scores) else None
    if score is not None and score.is_share:
        axes.barh(
            top + height / 2, score.value * (width - 0.1), height=0.8 * height, left=left + 0.05, color=BAR, zorder=0
        )


def _colour(row: Row, column: int, num_columns: int) -> str:
    if len(row.scores) < 2 or column != num_columns - 1 or row.is_better is None:
        return "black"
    return GOOD if row.is_better else BAD
