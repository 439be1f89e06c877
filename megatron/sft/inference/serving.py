"""The command that serves an exported model with vLLM, which is no part of this project."""

import json
import shlex
from pathlib import Path

MOST_POSITIONS = 32768  # a longer context takes memory from every GPU at the start
GPU_BYTES = 60e9  # of weights on one GPU of 80 GB


def serve_hint(folder: Path) -> str:
    """`vllm serve FOLDER ...` with what vLLM does not see itself: a name, float32, a length that fits, several GPUs."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    command = ["vllm", "serve", str(folder), "--served-model-name", folder.resolve().name]
    if config.get("dtype", config.get("torch_dtype")) == "float32":
        command += ["--dtype", "float32"]  # vLLM would round to 16 bits
    positions = config.get("max_position_embeddings", 0)
    if positions > MOST_POSITIONS:
        command += ["--max-model-len", str(MOST_POSITIONS)]
    if (gpus := _num_gpus(folder, config.get("num_attention_heads", 1))) > 1:
        command += ["--tensor-parallel-size", str(gpus)]
    return shlex.join(command)


def _num_gpus(folder: Path, num_heads: int) -> int:
    """The least power of two that holds the weights and divides the heads."""
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    gpus = 1
    while num_bytes > gpus * GPU_BYTES and num_heads % (2 * gpus) == 0:
        gpus *= 2
    return gpus
