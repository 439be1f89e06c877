"""Shows rows of tokenised data with the trained tokens marked: one on the terminal, or several and the totals as a page.

python -m megatron.sft.show_sample PREFIX [ROW] [--html FILE]
"""

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path

from megatron.sft.chat.encoding import load_tokenizer
from megatron.sft.data.preview import color_wanted, legend, page, row_text
from megatron.sft.data.tokenized import TokenizedRows, data_prefix
from megatron.sft.runtime.errors import OneLineParser, UserError, run
from megatron.sft.runtime.manifest import write_text


def main(argv: Sequence[str] | None = None) -> int:
    given = _parse(argv)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly in front of `head`
    rows = TokenizedRows(data_prefix(given.prefix))
    if not 0 <= given.row < len(rows):
        raise UserError(f"row {given.row} does not exist: {rows.prefix} has rows 0 to {len(rows) - 1}")
    folder = given.tokenizer or Path(rows.manifest["tokenizer"]["path"])
    if not folder.is_dir():
        raise UserError(
            f"tokenizer folder {folder}, from {rows.prefix}.json, does not exist: give another with --tokenizer FOLDER"
        )
    tokenizer = load_tokenizer(folder)
    if given.html:
        indices = range(given.row, min(given.row + max(1, given.rows), len(rows)))
        try:
            write_text(given.html, page(tokenizer, rows, indices))
        except OSError as error:
            raise UserError(f"cannot write {given.html} ({error.strerror}): give another file") from None
        print(f"wrote {given.html}: the totals, and rows {indices[0]} to {indices[-1]} of {len(rows)}")
        return 0
    color = color_wanted()
    row = rows[given.row]
    share = 100 * row.trained.mean()
    print(f"row {given.row} of {len(rows)}: {len(row.tokens)} tokens, {share:.1f} % trained; {legend(color)}")
    for line in row_text(tokenizer, row, color, rows.num_pairs > 0):
        print(line)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="show_sample", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prefix", type=Path, help="the files' common name; with or without .bin, .idx or .json")
    parser.add_argument("row", type=int, nargs="?", default=0, help="counts from 0")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    parser.add_argument("--rows", type=int, default=8, help="rows on the page")
    parser.add_argument("--tokenizer", type=Path, help="default: the folder that the manifest names")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
