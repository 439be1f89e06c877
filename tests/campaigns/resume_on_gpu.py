"""Every kind of optimizer and precision: six steps at once against three, a save, and three more. Status 1 if any differs.

python -m tests.campaigns.resume_on_gpu [NAME ...]
"""

import argparse
import json
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support import pair_material, tiny

# Attention's backward pass on a GPU adds in changing order, so that equal runs differ by rounding.
TOLERANCE = 2e-3
AT_ONCE = 4  # runs on one GPU, which the model fills to a thousandth
KINDS = {
    "bf16": [],
    "fp32": ["--precision", "fp32"],
    "fp16": ["--precision", "fp16"],
    "fp8": ["--precision", "fp8"],
    "fp8 delayed": ["--precision", "fp8", "--fp8-recipe", "delayed"],
    "fp8 blockwise": ["--precision", "fp8", "--fp8-recipe", "blockwise"],
    "bf16 optimizer": ["--optimizer-precision", "bf16"],
    "moments of 8 bits": ["--optimizer-precision", "8bit"],
    "offloaded optimizer": ["--optimizer-offload", "1"],
    "half offloaded": ["--optimizer-offload", "0.5"],
    "selective": ["--recompute", "selective"],
    "fp8 selective": ["--precision", "fp8", "--recompute", "selective"],
    "full": ["--recompute", "full"],
    "one layer": ["--recompute-layers", "1"],
    "fp8, one layer": ["--precision", "fp8", "--recompute-layers", "1"],
    "fp8 delayed, one layer": ["--precision", "fp8", "--fp8-recipe", "delayed", "--recompute-layers", "1"],
    "adapters": ["--lora-rank", "8", "--lora-dropout", "0.1"],
    "adapters, fp32": ["--lora-rank", "8", "--precision", "fp32", "--lora-plus", "4"],
    "adapters, fp8 full": ["--lora-rank", "8", "--precision", "fp8", "--recompute", "full", "--lora-dropout", "0.1"],
    "adapters, moments of 8 bits": ["--lora-rank", "8", "--optimizer-precision", "8bit", "--recompute", "selective"],
    "adapters, 16 bits": ["--lora-rank", "8", "--optimizer-precision", "bf16", "--recompute", "selective"],
    "frozen": ["--freeze", "embedding,attention,layers 0"],
    "frozen, 16 bits": ["--freeze", "mlp,norms", "--optimizer-precision", "bf16", "--recompute", "full"],
}
# On pairs, whose first step must have the loss without a margin, to the precision's tolerance, or the run stops.
DPO = ["--objective", "dpo", "--micro-batch-size", "2", "--dpo-beta", "0.5", "--lr", "1e-4", "--min-lr", "1e-5"]
KINDS |= {f"pairs, {kind}": [*DPO, *KINDS[kind]] for kind in ("bf16", "fp32", "fp16", "fp8", "fp8 delayed", "full")}
KINDS["pairs, adapters"] = [*DPO, "--lora-rank", "8"]


def train(folder: Path, save: Path, *options: str) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    on_pairs = "--objective" in options
    arguments = ["--load", folder / "model", "--save", save, "--train-iters", 6]
    arguments += ["--data-path", folder / ("pairs" if on_pairs else "rows")]
    if on_pairs:  # several kinds at once
        arguments += ["--reference-logps", folder / f"logps {save.name.removesuffix(' again')}"]
    arguments += ["--save-interval", 3, "--lr", 1e-3, "--min-lr", 1e-4, "--global-batch-size", 4, *options]
    tiny.run_on_gpu(0, "megatron.sft.train", *arguments)
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def difference(folder: Path, kind: str) -> tuple[str, float]:
    """A line on the run that was interrupted, and the largest relative difference of its losses."""
    try:
        whole = train(folder, folder / kind, *KINDS[kind])
        again = folder / f"{kind} again"
        again.mkdir()
        shutil.copytree(folder / kind / "iter_0000003", again / "iter_0000003")
        (again / tiny.TRACKER).write_text("3")
        resumed = train(folder, again, *KINDS[kind])
    except AssertionError as error:
        return f"FAILED\n{error}", float("inf")
    losses, norms = (
        max(abs(a[index] - b[index]) / b[index] for a, b in zip(resumed, whole[3:], strict=True)) for index in (0, 1)
    )
    return f"{whole[0][0]:.5f} -> {whole[-1][0]:.5f} losses {losses:.1e} norms {norms:.1e}", losses


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
        tiny.save_random(Qwen2ForCausalLM(config), folder / "hf")
        tiny.run_module("convert", "--hf-dir", folder / "hf", "--output", folder / "model")
        tiny.write_rows(folder / "rows", tiny.random_rows(24, 256), 256)
        pair_material.write_pair_rows(folder / "pairs", pair_material.random_pair_rows(24, 256), 256)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for kind, result in zip(names, pool.map(lambda kind: difference(folder, kind), names), strict=True):
                print(f"{kind:<20} {result[0]}", flush=True)
                if result[1] > TOLERANCE:
                    wrong.append(kind)
    assert not wrong, f"of {len(names)} kinds these differ: {', '.join(wrong)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of: {'; '.join(KINDS)}; default: all of them")
    chosen = parser.parse_args().names or list(KINDS)
    if unknown := set(chosen) - set(KINDS):
        parser.error(f"there is no kind {', '.join(sorted(unknown))}: take {'; '.join(KINDS)}")
    check(chosen)
