"""Every kind of optimizer and precision: six steps at once against three, a save, and three more. Status 1 if any differs.

python -m tests.campaigns.resume_on_gpu [NAME ...]
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support import tiny

# Attention's backward pass on a GPU adds in changing order, so that equal runs differ by rounding.
TOLERANCE = 2e-3
KINDS = {
    "bf16": [],
    "fp32": ["--precision", "fp32"],
    "fp16": ["--precision", "fp16"],
    "fp8": ["--precision", "fp8"],
    "fp8 delayed": ["--precision", "fp8", "--fp8-recipe", "delayed"],
    "bf16 optimizer": ["--optimizer-precision", "bf16"],
    "offloaded optimizer": ["--optimizer-offload", "1"],
    "selective": ["--recompute", "selective"],
    "fp8 selective": ["--precision", "fp8", "--recompute", "selective"],
    "full": ["--recompute", "full"],
}


def train(folder: Path, save: Path, *options: str) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    command = [sys.executable, "-m", "megatron.sft.train", "--load", folder / "model", "--data-path", folder / "rows"]
    command += ["--save", save, "--train-iters", "6", "--save-interval", "3", "--lr", "1e-3", "--min-lr", "1e-4"]
    command += ["--global-batch-size", "4", *options]
    environment = {**os.environ, "PYTHONPATH": f"{tiny.ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run(list(map(str, command)), env=environment, text=True, capture_output=True, timeout=200)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-5000:]
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def check(names: list[str]) -> None:
    """Print a line a kind; an AssertionError names those that differ."""
    wrong = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        from transformers import Qwen2Config, Qwen2ForCausalLM

        config = Qwen2Config(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=tiny.VOCAB_SIZE, max_position_embeddings=512, tie_word_embeddings=True,
        )  # fmt: skip
        tiny._save(Qwen2ForCausalLM(config), folder / "hf")
        tiny.run_module("convert", "--hf-dir", folder / "hf", "--output", folder / "model")
        tiny.write_rows(folder / "rows", tiny.random_rows(24, 256), 256)
        for kind in names:
            try:
                whole = train(folder, folder / kind, *KINDS[kind])
                again = folder / f"{kind} again"
                again.mkdir()
                shutil.copytree(folder / kind / "iter_0000003", again / "iter_0000003")
                (again / "latest_checkpointed_iteration.txt").write_text("3")
                resumed = train(folder, again, *KINDS[kind])
                difference = max(abs(a[0] - b[0]) / b[0] for a, b in zip(resumed, whole[3:], strict=True))
                norms = max(abs(a[1] - b[1]) / b[1] for a, b in zip(resumed, whole[3:], strict=True))
                print(
                    f"{kind:<20} {whole[0][0]:.5f} -> {whole[-1][0]:.5f} losses {difference:.1e} norms {norms:.1e}",
                    flush=True,
                )
                if difference > TOLERANCE:
                    wrong.append(kind)
            except AssertionError as error:
                wrong.append(kind)
                print(f"{kind:<20} FAILED\n{error}", flush=True)
    assert not wrong, f"of {len(names)} kinds these differ: {', '.join(wrong)}"


if __name__ == "__main__":
    check(sys.argv[1:] or list(KINDS))
