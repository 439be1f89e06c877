"""The quickstart, whole, as a newcomer runs it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process.test_first_hour import copied_repository
from tests.support import tiny


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quickstart_learns_to_sort_names(tmp_path: Path) -> None:
    root = copied_repository(tmp_path / "clone")
    shutil.copytree(tiny.ROOT / "assets" / "quickstart", root / "assets" / "quickstart")
    environment = {**os.environ, "MEGATRON_SFT_PYTHON": sys.executable}
    result = subprocess.run(
        ["bash", "scripts/quickstart.sh"], cwd=root, env=environment, text=True, capture_output=True, timeout=550
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((root / "outputs" / "quickstart" / "report.json").read_text())
    assert report["held_out"] >= 200
    assert report["exact_match_before"] <= 0.1
    assert report["exact_match_after"] >= 0.9
    assert report["last_loss"] < report["first_loss"] / 10
    assert (root / "outputs" / "quickstart" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "learned to sort names" in result.stdout
