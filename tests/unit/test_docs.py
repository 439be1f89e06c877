"""The documentation: its links work, and the output it shows is what the program prints."""

import re
from pathlib import Path

import pytest

from tests.process.test_plan import RECIPES
from tests.support import tiny

PAGES = [*sorted(tiny.ROOT.glob("*.md")), *sorted((tiny.ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    missing = []
    for target in re.findall(r"\]\((?!https?:)([^)]*)\)", page.read_text()):
        file, _, heading = target.partition("#")
        there = (page.parent / file) if file else page
        if not there.exists():
            missing.append(target)
        elif heading:
            titles = re.findall(r"^#+ (.+)$", there.read_text(), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in slugs, f"{page.name}: no heading for {target}"
    assert not missing, f"{page.name} links to what is not there: {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_script_and_recipe_that_a_page_names_is_there(page: Path) -> None:
    ours = page.read_text()
    if page.name == "from-other-systems.md":  # the middle column is other systems' own
        ours = "\n".join(
            row.rsplit("|", 2)[-2] if row.startswith("|") else row for row in ours.replace("\\|", "/").splitlines()
        )
    named = set(re.findall(r"(?<![\w./-])((?:scripts|tools|tests|megatron/sft)/[\w./-]+\w)", ours))
    missing = {
        name for name in named if not (tiny.ROOT / name).exists() and "RECIPE" not in name and Path(name).name != "mine.sh"
    }
    assert not missing, f"{page.name}: {', '.join(sorted(missing))}"


def test_every_recipe_is_named_in_the_readme() -> None:
    readme = (tiny.ROOT / "README.md").read_text()
    for recipe in RECIPES.values():
        size = re.fullmatch(r"SFT_Hybrid_R1_(.+)_OpenThoughts_1M", recipe.stem)
        assert recipe.name in readme or (size and f"…_{size[1]}_…" in readme), recipe.name
