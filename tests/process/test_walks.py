"""The walks that CONTRIBUTING describes are the ones that a record, a weight and a setting take."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.support import tiny

LIMITS = {"record": 24, "weight": 20, "setting": 5}  # the setting passes a recipe and scripts/4_train.sh before


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("walks")
    environment = {**os.environ, "MEGATRON_SFT_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.walk_tracer", str(folder)],
        cwd=tiny.ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    found: dict[str, list[str]] = json.loads(result.stdout.splitlines()[-1])
    return found


def described(walk: str) -> set[str]:
    """The files that CONTRIBUTING names below `### A record, …` and so on."""
    text = (tiny.ROOT / "CONTRIBUTING.md").read_text()
    (section,) = re.findall(rf"^### A {walk}, .*?(?=^##)", text, re.DOTALL | re.MULTILINE)
    return set(re.findall(r"`([\w/]+\.py)`", section))


@pytest.mark.parametrize("walk", LIMITS)
def test_a_walk_is_short_and_the_one_described(walks: dict[str, list[str]], walk: str) -> None:
    assert len(walks[walk]) <= LIMITS[walk], walks[walk]
    assert set(walks[walk]) == described(walk)
