"""The table of settings: `VARIABLE option` lines, which `scripts/4_train.sh` reads, or docs/options.md.

python -m megatron.sft.options [--markdown]
"""

import sys
from dataclasses import fields

from megatron.sft.planning.options import TrainOptions, as_markdown, flag_of, variable_of

if __name__ == "__main__":
    if sys.argv[1:] == ["--markdown"]:
        sys.stdout.write(as_markdown())
    else:
        for each in fields(TrainOptions):
            print(variable_of(each), flag_of(each))
