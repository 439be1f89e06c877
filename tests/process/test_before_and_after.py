"""Several models compared by one call of the evaluate script."""

import json
import os
import subprocess
from pathlib import Path

from tests.support.fork_server import SERVER
from tests.support.taught import TAUGHT, taught_folder, untrained_folder

ROOT = Path(__file__).resolve().parents[2]


def evaluate(folder: Path, *arguments: object) -> str:
    line = ["bash", str(ROOT / "scripts/7_evaluate.sh"), *map(str, arguments)]
    variables = os.environ | {**SERVER.python(), "CONTROL": "<short>", "MAX_NEW_TOKENS": "16"}
    variables["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(line, env=variables, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_before_and_after_on_a_file_makes_a_table_and_asks_nothing_twice(tmp_path: Path):
    data = tmp_path / "names.json"
    rows = [{"instruction": row[0], "output": row[1].removeprefix("<short> ")} for row in TAUGHT]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = (f"before={untrained_folder()}", f"after={taught_folder()}")
    said = evaluate(tmp_path, *models, data)
    line = "| names | exact match, <short> | 0.0 % | 100.0 % | +100.0 |"
    assert line in said.splitlines()
    results = tmp_path / "outputs/evaluations"
    assert line in (results / "scores.md").read_text()
    assert (results / "scores.png").read_bytes()[:4] == b"\x89PNG"
    assert "✗" in (results / "scores-answers.md").read_text() and "✓" in (results / "scores-answers.md").read_text()
    assert {path.name for path in results.glob("*.json")} == {"before-names.json", "after-names.json"}
    (results / "scores.md").unlink()
    again = evaluate(tmp_path, *models, data)
    assert again.count("kept from before") == 2 and line in (results / "scores.md").read_text()
    data.write_text(json.dumps(rows[0]) + "\n")
    assert "kept from before" not in evaluate(tmp_path, *models, data)
