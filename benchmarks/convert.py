"""Times conversion and export against copying and hashing the same bytes on the same disk, with the memory that they take.

python -m benchmarks.convert --gigabytes 3 --folder /data
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.sft.hf.folder import write_weights
from megatron.sft.runtime.errors import UserError, run
from megatron.sft.runtime.manifest import check_free_space, sha256_of_file, write_json

# Qwen2.5-1.5B, whose embeddings are tied.
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    check_free_space(arguments.folder, int(3.2e9 * arguments.gigabytes), "the benchmark")
    with tempfile.TemporaryDirectory(prefix="benchmark-convert-", dir=arguments.folder) as name:
        work = Path(name)
        source = write_random_model(work / "model", arguments.gigabytes)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        print(f"model of {size / 1e9:.2f} GB of weights in {work}")
        copying = _copy_and_hash(source, work / "copy")
        print(f"copy and SHA-256          {copying:6.1f} s")
        convert = ["convert", "--source", str(source), "--output", str(work / "checkpoint")]
        export = ["export", "--load", str(work / "checkpoint"), "--hf-dir", str(source), "--output", str(work / "export")]
        for command in (convert, export):
            seconds, memory = _measured(command)
            print(f"{command[0]:<24}  {seconds:6.1f} s  {seconds / copying:5.2f} times  {memory / 1e6:7.0f} MB anonymous")
        if {p.name: sha256_of_file(p) for p in source.glob("*.safetensors")} != {
            p.name: sha256_of_file(p) for p in (work / "export").glob("*.safetensors")
        }:
            raise UserError("the export is not the source: this is a defect of the project")
        print("the export is the source, byte for byte")
    return 0


def write_random_model(folder: Path, gigabytes: float) -> Path:
    """A model in the shape of Qwen2.5-1.5B with as many layers as give the size, at least one."""
    from megatron.sft.families.registry import read_architecture
    from megatron.sft.families.weight_names import weight_entries

    folder.mkdir()
    hidden, ffn = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    queries, keys = hidden, CONFIG["num_key_value_heads"] * (hidden // CONFIG["num_attention_heads"])
    layer_bytes = 2 * (2 * hidden * (queries + keys) + 3 * hidden * ffn)
    layers = (gigabytes * 1e9 - 2 * CONFIG["vocab_size"] * hidden) / layer_bytes
    config = {**CONFIG, "num_hidden_layers": max(1, min(round(layers), 400))}
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": ffn, "up_proj": ffn, "embed": 151936}
    plan: dict[str, Tensor] = {}
    for entry in weight_entries(read_architecture(config, "benchmark")):
        for name in entry.hf:
            size = next((count for part, count in rows.items() if part in name), hidden)
            columns = ffn if "down_proj" in name else hidden
            shape = (size,) if "norm" in name or name.endswith("bias") else (size, columns)
            plan[name] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    write_weights(folder, plan, _random(plan))
    write_json(folder / "config.json", config)
    return folder


def _random(plan: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in plan.items():
        bits = torch.randint(0x3C00, 0x3F80, tensor.shape, dtype=torch.int16, generator=generator)  # 0.008 to 1
        yield name, bits.view(torch.bfloat16)


def _copy_and_hash(source: Path, target: Path) -> float:
    """Seconds to copy the weights to the disk and hash them."""
    start = time.monotonic()
    shutil.copytree(source, target)
    for path in target.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        sha256_of_file(path)
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    return seconds


def _measured(command: list[str]) -> tuple[float, int]:
    """Seconds and peak anonymous memory (without mapped files) of a module's process."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", f"megatron.sft.{command[0]}", *command[1:]], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous_bytes(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise UserError(f"{command[0]} ended with status {process.returncode}: its message is above")
    return time.monotonic() - start, peak


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmark_convert", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--folder", type=Path, default=Path())
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
