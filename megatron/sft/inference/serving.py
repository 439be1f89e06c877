"""The command with which vLLM, which this project does not contain, serves an exported model."""

import json
import shlex
from pathlib import Path

from megatron.sft.inference.model_folder import adapter_rank, open_model_folder

MAX_POSITIONS = 32768  # vLLM reserves memory on every GPU for the whole context at the start
GPU_BYTES = 60e9  # of weights on one GPU of 80 GB; the rest is for keys and values


def serve_hint(folder: Path) -> str:
    """`vllm serve FOLDER ...` with what vLLM does not find out itself: a name, float32, a length that fits, several GPUs."""
    found = open_model_folder(folder)
    adapter, name, folder = found.adapter, folder.resolve().name, found.model
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {**config.get("text_config", {}), **config}
    command = ["vllm", "serve", str(folder)]
    if adapter:
        command += ["--enable-lora", "--max-lora-rank", str(max(8, adapter_rank(adapter)))]
        command += ["--lora-modules", f"{name}={adapter}", "--tokenizer", str(found.tokenizer)]
    else:
        command += ["--served-model-name", name]
    if config.get("dtype", config.get("torch_dtype")) == "float32":
        command += ["--dtype", "float32"]  # vLLM would round to 16 bits
    if config.get("max_position_embeddings", 0) > MAX_POSITIONS:
        command += ["--max-model-len", str(MAX_POSITIONS)]
    if (gpus := _num_gpus(folder, config.get("num_attention_heads", 1))) > 1:
        command += ["--tensor-parallel-size", str(gpus)]
    return shlex.join(command)


def _num_gpus(folder: Path, num_heads: int) -> int:
    """The smallest power of two of GPUs that hold the weights, as far as it divides the heads."""
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    gpus = 1
    while num_bytes > gpus * GPU_BYTES and num_heads % (2 * gpus) == 0:
        gpus *= 2
    return gpus
