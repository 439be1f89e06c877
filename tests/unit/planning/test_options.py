"""The table of settings: shell variables, options and the page made of them."""

import re

from megatron.sft.planning import options
from tests.support.tiny import ROOT


def test_the_page_of_settings_is_up_to_date() -> None:
    assert (ROOT / "docs" / "options.md").read_text() == options.as_markdown()


def test_every_variable_of_the_recipes_is_a_setting() -> None:
    """A misspelt variable would pass in silence."""
    known = {options.variable_of(setting) for setting in options.fields(options.TrainOptions)}
    recipes = sorted((ROOT / "scripts" / "sft").glob("*.sh"))
    assert recipes
    for recipe in recipes:
        text = recipe.read_text()
        for sourced in re.findall(r'^source "\$\w+/(?:\.\./)?((?:scripts/lib|sft)/\S+)"$', text, flags=re.MULTILINE):
            text += (ROOT / "scripts" / sourced.removeprefix("scripts/")).read_text()
        if "lib/recipe.sh" in text:
            text += (ROOT / "scripts" / "lib" / "recipe.sh").read_text()
        set_here = set(re.findall(r'^: "\$\{([A-Z0-9_]+):=', text, flags=re.MULTILINE))
        assert set_here - known <= {"ASSETS_DIR", "MODEL", "MODEL_SIZE", "DATA"}, recipe.name
        assert {"PRETRAIN_CHECKPOINT_PATH", "DATA_PATH", "OUTPUT_PATH"} <= set_here, recipe.name
