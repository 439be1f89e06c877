"""`tools/repack` as users start it."""

import os
import subprocess
from pathlib import Path

from megatron.sft.data.tokenized import TokenizedRows
from tests.support.fork_server import SERVER
from tests.support.tokenized_material import NAME, write

ROOT = Path(__file__).parents[2]


def test_the_command(tmp_path: Path) -> None:
    write(tmp_path)
    line = ["bash", str(ROOT / "tools/repack"), NAME.format(128), "--seq-length", "300"]
    environment = os.environ | {**SERVER.python()}
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "wrote " + NAME.format(300) + ".bin, .idx, .json"
    assert TokenizedRows(tmp_path / NAME.format(300)).manifest["rows"] > 0
