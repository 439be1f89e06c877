"""The table of settings: `VARIABLE option` lines, which `scripts/4_train.sh` reads, or docs/options.md.

python -m megatron.sft.options [--markdown]
"""

from collections.abc import Sequence
from dataclasses import fields

from megatron.sft.planning.options import TrainOptions, as_markdown, flag_of, variable_of
from megatron.sft.runtime.errors import OneLineParser, run


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="options", description="The table of a run's settings.")
    parser.add_argument("--markdown", action="store_true", help="print docs/options.md")
    if parser.parse_args(argv).markdown:
        print(as_markdown(), end="")
        return 0
    for setting in fields(TrainOptions):
        print(variable_of(setting), flag_of(setting))
    return 0


if __name__ == "__main__":
    run(main)
