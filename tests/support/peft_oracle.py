"""LoRA training by PEFT and transformers, conversation by conversation in float32: what ours must equal.

python -m tests.support.peft_oracle save|train FOLDER ARGUMENT…: the same in a process with another version of transformers.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support import material, tiny, tiny_families

Tensors = dict[str, torch.Tensor]
Steps = Sequence[Sequence[tuple[np.ndarray, np.ndarray]]]


@dataclass(frozen=True)
class Trained:
    """Losses and gradient norms by step, the first step's gradients and the last weights by PEFT's names."""

    losses: list[float]
    norms: list[float]
    gradients: Tensors
    weights: Tensors


def save_adapter(model_folder: Path, folder: Path, rank: int = 4, seed: int = 0, **config: Any) -> Path:
    """A PEFT adapter of the model with random A and random B, saved by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    options = {"r": rank, "lora_alpha": 2 * rank, "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(base, LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def train(
    model_folder: Path, adapter: Path | None, steps: Steps, lr: float, plus: float = 1.0, frozen: str = "", clip: float = 0.0
) -> Trained:
    """`steps`: the conversations of each step. Without an adapter the model itself, without gradients for the names of its
    parameters that the regular expression `frozen` finds. plus: factor of the learning rate of B; clip: largest norm."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not re.search(frozen, name))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = {name: p for name, p in trained.items() if p.ndim > 1 and not name.endswith("bias")}
    groups = [
        {"params": [p for name, p in decayed.items() if "lora_B" not in name]},
        {"params": [p for name, p in decayed.items() if "lora_B" in name], "lr": lr * plus},
        {"params": [p for name, p in trained.items() if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    losses: list[float] = []
    norms: list[float] = []
    first: Tensors = {}
    for conversations in steps:
        total, count = torch.zeros(()), 0
        for prompt, answer in conversations:
            ids = torch.from_numpy(np.concatenate([prompt, answer]))
            log_p = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
            picked = log_p[torch.arange(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]]
            total, count = total - picked.sum(), count + len(answer)
        optimizer.zero_grad()
        (total / count).backward()
        losses.append(float(total.detach() / count))
        gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm()))
        first = first or {name.replace(".default", ""): gradient.clone() for name, gradient in gradients.items()}
        if clip:
            torch.nn.utils.clip_grad_norm_(trained.values(), clip)
        optimizer.step()
    if adapter is not None:
        state = get_peft_model_state_dict(model)
    else:
        with tempfile.TemporaryDirectory() as folder:  # under the names of files: experts are one tensor in memory
            model.save_pretrained(folder)
            state = {name: tensor.clone() for name, tensor in tiny.tensors(Path(folder)).items()}
    return Trained(losses, norms, first, {name: tensor.detach().clone() for name, tensor in state.items()})


def make(folder: Path, family: str, **config: Any) -> None:
    """A model of tiny_families.py under hf/ and, where it is described, an adapter of it under adapter/."""
    model = tiny_families.save_family(folder / "hf", family)
    if config:
        save_adapter(model, folder / "adapter", **config)


def make_elsewhere(folder: Path, family: str, **config: Any) -> None:
    """The same by transformers 4.57, where every expert's projections are modules of their own, which PEFT can adapt."""
    _elsewhere("save", folder, family, json.dumps(config))


def train_elsewhere(folder: Path, steps: Steps, lr: float) -> Trained:
    """`train` of what `make_elsewhere` made, by the same transformers."""
    torch.save(steps, folder / "steps.pt")
    _elsewhere("train", folder, str(lr))
    return Trained(**torch.load(folder / "trained.pt", weights_only=False))


def _elsewhere(*arguments: object) -> None:
    path = os.pathsep.join([str(material.transformers_4_folder()), str(tiny.ROOT)])
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.peft_oracle", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=tiny.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=tiny.TIMEOUT_SECONDS,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:]


def main() -> None:
    import transformers

    assert transformers.__version__.startswith("4."), transformers.__file__
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "save":
        make(folder, sys.argv[3], **json.loads(sys.argv[4]))
        return
    steps = torch.load(folder / "steps.pt", weights_only=False)
    trained = train(folder / "hf", folder / "adapter", steps, float(sys.argv[3]))
    torch.save(vars(trained), folder / "trained.pt")


if __name__ == "__main__":
    main()
