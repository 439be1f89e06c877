"""The loss curve of one run or several as a PNG, from metrics.jsonl. `tools/plot_loss RUN...` runs

python -m megatron.sft.plot outputs/checkpoints/RUN --output loss.png
"""

from collections.abc import Sequence
from pathlib import Path

from megatron.sft.reporting.curves import read_curve, run_names
from megatron.sft.reporting.loss_plot import AXES, comparison, draw, title_of
from megatron.sft.runtime.errors import OneLineParser, run


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="plot_loss", description="Loss curve of one run or several, as a PNG.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, or their metrics.jsonl")
    parser.add_argument("--output", type=Path, help="default: loss.png, or comparison.png, in the first run's folder")
    parser.add_argument("--title")
    parser.add_argument("--x", choices=list(AXES), default="iteration", help="the horizontal axis")
    parser.add_argument("--by-source", action="store_true", help="with the loss of every source of the data")
    arguments = parser.parse_args(argv)
    names = run_names(arguments.runs)
    curves = [read_curve(path, name) for path, name in zip(arguments.runs, names, strict=True)]
    first: Path = arguments.runs[0]
    folder = first if first.is_dir() else first.parent
    output: Path = arguments.output or folder / ("loss.png" if len(curves) == 1 else "comparison.png")
    draw(curves, output, arguments.title or title_of(curves), arguments.x, arguments.by_source)
    if len(curves) > 1:
        print(comparison(curves))
    print(f"loss curve: {output}")
    return 0


if __name__ == "__main__":
    run(main)
