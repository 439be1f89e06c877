"""`tools/plot_loss` as users start it."""

import json
import os
import subprocess
from pathlib import Path

from megatron.sft.reporting.curves import read_curve
from tests.support.fork_server import SERVER
from tests.support.metrics_material import png_size, write_metrics

ROOT = Path(__file__).resolve().parents[2]


def test_tool_writes_next_to_the_metrics(tmp_path):
    folder = write_metrics(tmp_path / "run")
    line = ["bash", str(ROOT / "tools/plot_loss"), str(folder)]
    done = subprocess.run(line, env=os.environ | {**SERVER.python()}, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"loss curve: {folder}/loss.png\n"
    assert png_size(folder / "loss.png") == (864, 576)


def test_runs_side_by_side_are_a_table_and_a_picture_by_tokens(tmp_path):
    for name, tokens in (("one", 1_000_000), ("two", 500_000)):
        lines = [
            {"iteration": step, "loss": 2.0, "lr": 1e-3, "epoch": step / 10, "tokens": tokens, "tokens_per_second": 100.0}
            for step in (2, 4)  # every other step is logged
        ]
        lines[1]["sources"] = {"a": {"loss": 1.5, "trained_tokens": 9}}
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in [*lines, {"iteration": 3, "validation_loss": 1.25}])
        (tmp_path / name / "metrics.jsonl").write_text(text)
    curve = read_curve(tmp_path / "one", "one")
    assert (curve.x("tokens"), curve.x("epoch"), curve.validation_x("tokens")) == ([2.0, 4.0], [0.2, 0.4], [2.0])
    assert curve.sources == {"a": [(4, 1.5)]}
    line = [SERVER.python()["MEGATRON_SFT_PYTHON"], "-m", "megatron.sft.plot", "one", "two", "--x", "tokens", "--by-source"]
    variables = os.environ | SERVER.python()
    done = subprocess.run(line, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == [
        "| run | steps | million tokens | loss at the end | best validation | tokens/s |",
        "|---|---|---|---|---|---|",
        "| one | 4 | 4.00 | 2.0000 | 1.2500 | 100 |",
        "| two | 4 | 2.00 | 2.0000 | 1.2500 | 100 |",
        "loss curve: one/comparison.png",
    ]
    assert png_size(tmp_path / "one" / "comparison.png") == (864, 576)
