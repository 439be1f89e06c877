"""Puts the Markdown table that a campaign printed into docs/reliability.md, between the marks of that campaign.

python -m tests.campaigns.fault_table NAME FILE
"""

import re
import sys
from pathlib import Path

from tests.support.tiny import ROOT

PAGE = ROOT / "docs" / "reliability.md"


def with_table(page: str, name: str, output: str) -> str:
    """The page with the last table of `output` between `<!-- NAME -->` and `<!-- /NAME -->`."""
    tables = re.findall(r"(?:^\|.*\n)+", output, re.MULTILINE)
    if not tables:
        raise SystemExit(f"the campaign {name} printed no table")
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not marks.search(page):
        raise SystemExit(f"{PAGE} has no place for {name}: write <!-- {name} --> and <!-- /{name} -->")
    return marks.sub(lambda found: f"{found[1]}\n{tables[-1]}\n{found[2]}", page)


if __name__ == "__main__":
    table_of, file = sys.argv[1:]
    PAGE.write_text(with_table(PAGE.read_text(), table_of, Path(file).read_text()))
