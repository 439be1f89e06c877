"""A metrics.jsonl of a run, and the size of a picture of it."""

import json
from pathlib import Path


def write_metrics(folder: Path, num_steps: int = 50, pairs: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"iteration": step, "loss": 5.0 / step, "lr": 1e-3} for step in range(1, num_steps + 1)]
    lines.insert(20, {"iteration": 20, "validation_loss": 0.3})
    if pairs:
        lines = [{**line, "rewards/margins": 0.1 * number} for number, line in enumerate(lines)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
