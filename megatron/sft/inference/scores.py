"""Scores of several models in one table, as Markdown and as a PNG."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.sft.runtime.manifest import write_bytes

BETTER, WORSE, SOFT, TRACK, BAR = "#15803d", "#b91c1c", "#6b7280", "#e5e7eb", "#3f7fc1"


@dataclass(frozen=True)
class Score:
    """One figure of one model. error: its standard error, if known. higher_is_better, num_questions: None if unknown."""

    task: str
    metric: str
    value: float
    error: float | None = None
    higher_is_better: bool | None = True
    num_questions: int | None = None

    @property
    def is_share(self) -> bool:
        """Whether it is between 0 and 1 and shown in per cent."""
        return 0 <= self.value <= 1 and self.higher_is_better is not False

    @property
    def text(self) -> str:
        if not self.is_share:
            return f"{self.value:.4g}"
        error = f" ± {100 * self.error:.1f}" if self.error else ""
        return f"{100 * self.value:.1f}{error} %"


@dataclass(frozen=True)
class TableLine:
    """One metric of one task. scores: of each model; None for a model without this figure."""

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
        """In percentage points for shares."""
        if self.change is None:
            return ""
        is_share = all(score.is_share for score in self.scores if score)
        return f"{100 * self.change:+.1f}" if is_share else f"{self.change:+.4g}"

    @property
    def is_better(self) -> bool | None:
        """Whether the change is for the better; None if nothing changed or the better direction is unknown."""
        direction = next((score.higher_is_better for score in self.scores if score), None)
        return None if not self.change or direction is None else (self.change > 0) == direction


def table_lines(scores: Sequence[Sequence[Score]]) -> list[TableLine]:
    """The scores of each model as lines, in the order in which tasks and metrics first appear."""
    by_key = [{(score.task, score.metric): score for score in of_model} for of_model in scores]
    keys = dict.fromkeys(key for of_model in by_key for key in of_model)
    return [TableLine(*key, tuple(of_model.get(key) for of_model in by_key)) for key in keys]


def header(models: Sequence[str]) -> list[str]:
    return ["task", "metric", *models, *(["change"] if len(models) > 1 else [])]


def cells(line: TableLine) -> list[str]:
    values = ["-" if score is None else score.text for score in line.scores]
    return [line.task, line.metric, *values, *([line.change_text] if len(line.scores) > 1 else [])]


def markdown(models: Sequence[str], lines: Sequence[TableLine]) -> str:
    """Shares are in per cent, with their standard error; changes of them are in percentage points."""
    table = [header(models), ["---"] * 2 + ["---:"] * (len(header(models)) - 2), *map(cells, lines)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in table)


def draw(models: Sequence[str], lines: Sequence[TableLine], output: Path, caption: str = "") -> None:
    """The table as a PNG: a bar below each share, on a track from 0 to 100 %; changes for the better green, others red."""
    from matplotlib.figure import Figure

    # Columns of models have room for a bar, whatever is in them.
    names = header([name.rjust(22) for name in models])
    figure = Figure(figsize=(0.1, 0.1), dpi=150)  # savefig fits the picture to the table
    axes = figure.subplots()
    axes.axis("off")
    texts = [cells(line) for line in lines]
    for words, line in zip(texts, lines, strict=True):
        if asked := next((score.num_questions for score in line.scores if score and score.num_questions), None):
            words[1] += f", n = {asked:,}"
    table = axes.table([names, *texts], loc="center", edges="B")
    table.auto_set_font_size(False)
    table.auto_set_column_width(range(len(names)))
    table.scale(1, 1.9)
    for (row, column), cell in table.get_celld().items():
        cell.set_edgecolor(TRACK)
        cell.set_text_props(ha="left" if column < 2 else "right", **({"color": SOFT} if not row else {}))
    for index, line in enumerate(lines, start=1):
        if len(models) > 1 and line.is_better is not None:
            table[index, len(names) - 1].set_text_props(color=BETTER if line.is_better else WORSE)
    figure.draw_without_rendering()  # places the cells
    boxes = {
        place: cell.get_window_extent().transformed(axes.transAxes.inverted()) for place, cell in table.get_celld().items()
    }
    width = 0.8 * min(boxes[0, column].width for column in range(2, 2 + len(models)))
    for index, line in enumerate(lines, start=1):
        for column, score in enumerate(line.scores, start=2):
            if score and score.is_share:
                _draw_bar(axes, boxes[index, column], width, score.value)
    bottom = boxes[len(lines), 0].min
    text: Any = {"color": SOFT, "fontsize": "small", "va": "top", "linespacing": 1.5}
    axes.annotate(caption, bottom, xycoords="axes fraction", xytext=(4, -6), textcoords="offset points", **text)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", bbox_inches="tight")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, picture.getvalue())


def _draw_bar(axes: Any, box: Any, width: float, share: float) -> None:
    """At the bottom right of a cell, whose place `box` is in fractions of the axes."""
    from matplotlib.patches import Rectangle

    left, height = box.x1 - width - 0.1 * box.width, 0.1 * box.height
    for length, color in ((width, TRACK), (share * width, BAR)):
        place = (left, box.y0 + height), length, height
        axes.add_patch(Rectangle(*place, color=color, linewidth=0, transform=axes.transAxes, clip_on=False))
