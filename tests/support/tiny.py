"""Tiny models and tiny tokenised data, and running the project's modules in real processes."""

import json
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np

from tests.support.fork_server import SERVER, environment_of_runs

ROOT = Path(__file__).resolve().parents[2]
TRACKER = "latest_checkpointed_iteration.txt"
VOCAB_SIZE = 131
TIMEOUT_SECONDS = 240

# A conversation is (prompt tokens, answer tokens); a row is a list of them.
Conversation = tuple[np.ndarray, np.ndarray]


def save_qwen2(folder: Path, tied: bool) -> Path:
    """Random float32 weights, larger than transformers' own, so that every part of the model matters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        use_sliding_window=False,
    )
    return save_random(Qwen2ForCausalLM(config), folder)


def save_llama(folder: Path) -> Path:
    """bfloat16, 5 layers (uneven over 2 or 4 stages), head_dim apart from hidden size / heads."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    return save_random(LlamaForCausalLM(config), folder, torch.bfloat16)


def save_random(model: "object", folder: Path, dtype: "object" = None) -> Path:
    """Save a model of transformers with random weights, the same for the same shapes."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # type: ignore[attr-defined]
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(parameter.mean().round() + 0.2 * noise)  # around 0 where a norm adds 1 to its weight
            elif "conv1d" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * (0.5 if name.endswith("bias") and "correction" not in name else 0.1))
        for name, buffer in model.named_buffers():  # type: ignore[attr-defined]
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    if dtype is not None:
        kept = {name: buffer.clone() for name, buffer in model.named_buffers()}  # type: ignore[attr-defined]
        model.to(dtype)  # type: ignore[attr-defined]
        for name, buffer in kept.items():  # float32, as released models have it
            if name.endswith("e_score_correction_bias"):
                model.get_buffer(name).data = buffer  # type: ignore[attr-defined]
    model.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


def random_rows(num_rows: int, length: int, seed: int = 0, longest: int = 23) -> list[list[Conversation]]:
    """Rows of as many random conversations of 4 to `longest` tokens as fit."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        row: list[Conversation] = []
        while sum(len(p) + len(a) for p, a in row) <= length - longest - 1:
            size = int(generator.integers(4, longest + 1))
            prompt = int(generator.integers(1, size))
            tokens = generator.integers(0, VOCAB_SIZE, size)
            row.append((tokens[:prompt], tokens[prompt:]))
        rows.append(row)
    return rows


def write_rows(prefix: Path, rows: list[list[Conversation]], length: int, joined: Collection[int] = ()) -> Path:
    """Write rows as tokenised data with a manifest; returns the prefix. joined: rows in one row group with the row before."""
    from megatron.sft.data.tokenized import (
        FORMAT,
        MODE_CONTINUES_GROUP,
        MODE_FIRST,
        MODE_TRAINED,
        data_file,
        token_dtype,
        write_index,
    )
    from megatron.sft.runtime.manifest import sealed, sha256_of_file, write_json

    lengths, modes, documents = [], [], [0]
    for number, row in enumerate(rows):
        for prompt, answer in row:
            lengths += [len(prompt), len(answer)]
            modes += [MODE_FIRST, MODE_TRAINED]
        if number in joined:
            modes[-2 * len(row)] |= MODE_CONTINUES_GROUP
        documents.append(len(lengths))
    dtype = token_dtype(VOCAB_SIZE)
    tokens = np.concatenate([part for row in rows for pair in row for part in pair]).astype(dtype)
    tokens.tofile(data_file(prefix, "bin"))
    write_index(data_file(prefix, "idx"), dtype, np.array(lengths), np.array(documents), np.array(modes))
    trained = int(np.array(lengths)[np.array(modes) == MODE_TRAINED].sum())
    manifest = {
        "format": FORMAT,
        "length": length,
        "rows": len(rows),
        "conversations": sum(map(len, rows)),
        "tokens": len(tokens),
        "trained_tokens": trained,
        "max_token_id": int(tokens.max()),
        "dtype": dtype.name,
        "chat_template": None,
        "files": {
            ending: {"bytes": data_file(prefix, ending).stat().st_size, "sha256": sha256_of_file(data_file(prefix, ending))}
            for ending in ("bin", "idx")
        },
    }
    write_json(data_file(prefix, "json"), sealed(manifest))
    return prefix


def run_module(module: str, *arguments: object, status: int = 0) -> str:
    """Run `python -m megatron.sft.<module>` and return its output; `status` is the exit status it must have."""
    return run(0, f"megatron.sft.{module}", *arguments, status=status)


def launch(processes: int, module: str, *arguments: object, status: int = 0) -> str:
    """The same in several processes over gloo."""
    return run(processes, f"megatron.sft.{module}", *arguments, status=status)


def launch_test_worker(processes: int, script: Path, *arguments: object, status: int = 0) -> str:
    """Run a test's own script in several processes."""
    return run(processes, str(script), *arguments, status=status)


def run_script(script: Path, *arguments: object) -> str:
    """Run a test's own script in one process."""
    return run(0, str(script), *arguments)


def run(processes: int, program: str, *arguments: object, status: int = 0, seconds: float = TIMEOUT_SECONDS) -> str:
    """Run a module by its whole name, or a script by its path: in one process, or in as many as the launcher would start.

    The processes are forked; where the environment asks for it, or a launched run must fail, they are started.
    """
    environment = environment_of_runs()
    texts = list(map(str, arguments))
    if SERVER.suits(environment) and not (processes and status):
        returned, output = SERVER.run(program, texts, environment, processes, seconds)
    else:
        returned, output = start(processes, program, texts, environment, seconds)
    assert returned == status, f"status {returned} instead of {status}:\n{output[-6000:]}"
    return output


def run_on_gpu(processes: int, program: str, *arguments: object, seconds: float = TIMEOUT_SECONDS) -> str:
    """The same with the machine's GPUs."""
    environment = environment_of_runs(on_gpu=True)
    returned, output = start(processes, program, list(map(str, arguments)), environment, seconds)
    assert returned == 0, f"status {returned}:\n{output[-20000:]}"
    return output


def start(processes: int, program: str, arguments: list[str], environment: dict[str, str], seconds: float) -> tuple[int, str]:
    """Exit status and output of a module or script in a process that is started, or in several by the launcher."""
    command = [sys.executable]
    if processes:
        command += ["-m", "megatron.sft.launch", "--standalone", "--local-addr", "localhost"]
        command += ["--nproc-per-node", str(processes)]
    command += [program] if program.endswith(".py") else ["-m", program]
    result = subprocess.run(
        [*command, *arguments], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds
    )
    return result.returncode, result.stdout


def as_of(iteration: int, run: Path, copy: Path) -> Path:
    """A copy of a run as it was when it had saved this iteration's checkpoint, to resume; returns `copy`."""
    shutil.copytree(run, copy)
    for folder in copy.glob("iter_*"):
        if int(folder.name[5:]) > iteration:
            shutil.rmtree(folder)
    (copy / TRACKER).write_text(str(iteration))
    return copy


def losses(folder: Path) -> list[float]:
    """The training losses of a run, step by step."""
    return [line["loss"] for line in metrics(folder) if "loss" in line]


def validation_losses(folder: Path) -> list[float]:
    return [line["validation_loss"] for line in metrics(folder) if "validation_loss" in line]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensors(folder: Path) -> "dict[str, object]":
    """All tensors of a Hugging Face folder."""
    from safetensors.torch import load_file

    result: dict[str, object] = {}
    for path in sorted(folder.glob("*.safetensors")):
        result.update(load_file(path))
    return result


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit-equal: the same names, dtypes and values."""
    import torch

    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert isinstance(tensor, torch.Tensor)
        other_tensor = theirs[name]
        assert isinstance(other_tensor, torch.Tensor)
        assert tensor.dtype == other_tensor.dtype and torch.equal(tensor, other_tensor), name
