"""Prints a row of tokenised data with the trained tokens in colour and the borders of its conversations.

python tools/show_sample.py data/Tokenized-…_text_document [ROW]
"""

import argparse
import signal
from pathlib import Path

from megatron.sft.data.encoding import load_tokenizer
from megatron.sft.data.preview import colour_wanted, legend, row_text
from megatron.sft.data.tokenized import TokenizedRows
from megatron.sft.errors import UserError, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("prefix", help="the files' common name; with or without .bin, .idx or .json")
    parser.add_argument("row", type=int, nargs="?", default=0)
    parser.add_argument("--tokenizer", type=Path, help="default: the folder that the manifest names")
    arguments = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly in front of `head`
    name = arguments.prefix
    for ending in (".bin", ".idx", ".json"):
        name = name.removesuffix(ending)
    rows = TokenizedRows(Path(name))
    if not 0 <= arguments.row < len(rows):
        raise UserError(f"row {arguments.row} does not exist: {name} has rows 0 to {len(rows) - 1}")
    tokenizer = load_tokenizer(arguments.tokenizer or Path(rows.manifest["tokenizer"]["path"]))
    colour = colour_wanted()
    row = rows[arguments.row]
    share = 100 * row.trained.mean()
    print(f"row {arguments.row} of {len(rows)}: {len(row.tokens)} tokens, {share:.1f} % trained; {legend(colour)}")
    for line in row_text(tokenizer, row, colour):
        print(line)


if __name__ == "__main__":
    run(main)
