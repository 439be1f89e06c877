"""Scores of several models in one table, as Markdown and as a PNG."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.sft.runtime.manifest import write_bytes

BETTER, WORSE, HEADER = "#15803d", "#b91c1c", "#cfe0f3"


@dataclass(frozen=True)
class Score:
    """One figure of one model. error: its standard error, if known. higher_is_better: None if unknown."""

    task: str
    metric: str
    value: float
    error: float | None = None
    higher_is_better: bool | None = True

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


def draw(models: Sequence[str], lines: Sequence[TableLine], output: Path) -> None:
    """The table as a PNG; changes for the better are green, others red."""
    from matplotlib.figure import Figure

    names = header(models)
    figure = Figure(figsize=(0.1, 0.1))  # savefig fits the picture to the table
    axes = figure.subplots()
    axes.axis("off")
    colours = [[HEADER] * len(names), *([["white"] * len(names)] * len(lines))]
    table = axes.table([names, *map(cells, lines)], colours, loc="center")
    table.auto_set_font_size(False)
    table.auto_set_column_width(range(len(names)))
    table.scale(1, 1.5)
    for index in range(len(lines) + 1):
        for column in (0, 1):
            table[index, column].set_text_props(ha="left")
    for index, line in enumerate(lines, start=1):
        if len(models) > 1 and line.is_better is not None:
            table[index, len(names) - 1].set_text_props(color=BETTER if line.is_better else WORSE)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png", bbox_inches="tight")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, picture.getvalue())
