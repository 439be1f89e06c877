"""Follows one chat record, one weight and one setting through the package, and prints the files whose code touches each.

python -m tests.support.walk_tracer FOLDER     prints {"record": [...], "weight": [...], "setting": [...]} as JSON

A file touches the record or the weight if a function of it has it among its arguments or variables when it returns: the text,
the token ids, or the values by which record and weight are recognized. It touches the setting if it reads it by its name.
Kernels, `__init__` and the room `runtime` (whose functions take whatever they are given) are not counted.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from tests.support import tiny

PACKAGE = str(tiny.ROOT / "megatron" / "sft") + os.sep
QUICKSTART = tiny.ROOT / "assets" / "quickstart"
ANSWER = "Zoe Quin Zoe Quin Val Val Zoe"  # in one record only
VALUE = 0.4453125  # of every element of one weight, exact in all precisions
DEPTH, ELEMENTS = 4, 64


def inside(value: Any, found: Callable[[Any], bool], depth: int = DEPTH) -> bool:
    """Whether `found` holds for the value or for something in it: the first elements of containers, the fields of records."""
    if found(value):
        return True
    if depth == 0 or isinstance(value, str | bytes | int | float | type(None) | torch.nn.Module):
        return False
    if isinstance(value, dict):
        parts = list(value.values())[:ELEMENTS]
    elif isinstance(value, list | tuple | set | frozenset):
        parts = list(value)[:ELEMENTS]
    elif type(value).__module__.startswith("megatron.sft") and hasattr(value, "__dict__"):
        parts = list(vars(value).values())[:ELEMENTS]
    else:
        return False
    return any(inside(part, found, depth - 1) for part in parts)


@contextlib.contextmanager
def traced(found: Callable[[Any], bool]) -> Iterator[set[str]]:
    """The files of which a function holds what `found` recognises when it returns, in every thread."""
    files: set[str] = set()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if event != "return" or not name.startswith(PACKAGE):
            return
        path = name.removeprefix(PACKAGE)
        if path in files or path.endswith("__init__.py") or path.startswith(("runtime/", "kernels/")):
            return
        values = [argument, *(value for key, value in frame.f_locals.items() if key != "self")]
        if any(inside(value, found) for value in values):
            files.add(path)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield files
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def is_record(ids: list[int]) -> Callable[[Any], bool]:
    pattern = np.array(ids)

    def found(value: Any) -> bool:
        if isinstance(value, str):
            return ANSWER in value
        if isinstance(value, bytes | bytearray):
            return ANSWER.encode() in value
        if isinstance(value, list) and value and all(type(element) is int for element in value[:3]):
            value = np.array(value[:4096])
        if isinstance(value, torch.Tensor):
            value = value.detach().flatten().numpy() if value.dtype in (torch.int64, torch.int32) else np.zeros(0)
        # Who holds the run's plan can reach the whole .bin file, and touches no record by that.
        if not isinstance(value, np.ndarray) or isinstance(value, np.memmap):
            return False
        if value.dtype.kind not in "iu" or value.size < len(pattern):
            return False
        flat = value.ravel()
        starts = np.flatnonzero(flat[: len(flat) - len(pattern) + 1] == pattern[0])
        return any(np.array_equal(flat[start : start + len(pattern)], pattern) for start in starts)

    return found


def is_weight(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and not value.is_meta
        and value.numel() >= 64
        and int((value.detach() == VALUE).sum()) >= 64
    )


def make_model(folder: Path) -> None:
    """The tiny Qwen2 with the quickstart's tokenizer, one of its weights recognisable."""
    from safetensors.torch import load_file, save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1301, max_position_embeddings=256, tie_word_embeddings=False, use_sliding_window=False,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(VALUE)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_bytes((QUICKSTART / name).read_bytes())


def write_data(path: Path) -> list[int]:
    """Records of the quickstart and one that is recognisable; its answer's token ids."""
    from tokenizers import Tokenizer

    lines = (QUICKSTART / "train.json").read_text().splitlines()[:40]
    lines.insert(7, json.dumps({"instruction": "Sort these names: Val", "output": ANSWER}))
    path.write_text("\n".join(lines) + "\n")
    return list(Tokenizer.from_file(str(QUICKSTART / "tokenizer.json")).encode(ANSWER, add_special_tokens=False).ids)


def setting_files() -> list[str]:
    """The files that read the size of tensor parallelism between the command line and TransformerConfig."""
    from megatron.sft.model.layout import Layout
    from megatron.sft.planning.options import TrainOptions

    files: set[str] = set()

    def counted(self: Any, name: str) -> Any:
        if name == "tensor_parallel":
            path = sys._getframe(1).f_code.co_filename
            if path.startswith(PACKAGE):
                files.add(path.removeprefix(PACKAGE))
        return object.__getattribute__(self, name)

    for kind in (TrainOptions, Layout):
        kind.__getattribute__ = counted  # type: ignore[method-assign,assignment]
    from megatron.sft.model.config import transformer_config
    from megatron.sft.planning.options import parse
    from megatron.sft.planning.resolution import plan_run

    mode, options = parse(sys.argv[2:])
    plan = plan_run(mode, options, 2)
    transformer_config(plan.architecture, plan.layout, options.precision)
    for kind in (TrainOptions, Layout):
        del kind.__getattribute__  # type: ignore[method-assign]
    # The table itself, which names the setting once.
    return sorted(files | {"planning/options.py"})


def main() -> None:
    from megatron.sft import convert, export, tokenize, train

    folder = Path(sys.argv[1])
    model, converted, prefix, run = folder / "model", folder / "converted", folder / "rows", folder / "run"
    make_model(model)
    ids = write_data(folder / "data.jsonl")
    steps = ["--load", converted, "--data-path", prefix, "--save", run, "--train-iters", 1, "--global-batch-size", 64]
    steps += ["--lr", 0, "--min-lr", 0, "--precision", "fp32", "--async-save", 0]
    settings = [str(word) for word in ["train", *steps, "--micro-batch-size", 16]]
    with traced(is_weight) as weight:
        assert convert.main(["--source", str(model), "--output", str(converted)]) == 0
    words = ["--tokenizer", model, "--input", folder / "data.jsonl", "--seq-length", 128, "--output-prefix", prefix]
    with traced(is_record(ids)) as record:
        assert tokenize.main([*map(str, words), "--num-workers", "1"]) == 0
    sys.argv = ["walk_tracer", str(folder), *settings, "--tensor-model-parallel-size", "2"]
    setting = setting_files()
    with traced(is_weight) as weight_in_training:
        assert train.main(settings) == 0
    with traced(is_record(ids)) as record_in_training:
        assert train.main([*settings[:5], "--save", str(folder / "again"), *settings[7:]]) == 0
    with traced(is_weight) as weight_in_export:
        assert export.main(["--load", str(run), "--hf-dir", str(model), "--output", str(folder / "exported")]) == 0
    print(
        json.dumps(
            {
                "record": sorted(record | record_in_training),
                "weight": sorted(weight | weight_in_training | weight_in_export),
                "setting": setting,
            }
        )
    )


if __name__ == "__main__":
    main()
