"""LoRA training by PEFT and transformers, conversation by conversation in float32: what ours must equal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]


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
    model_folder: Path, adapter: Path, steps: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], lr: float, plus: float = 1.0
) -> tuple[list[float], Tensors, Tensors]:
    """Losses, the first step's gradients and the last weights by PEFT's names. `steps`: the conversations of each step."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {"params": [p for name, p in trained.items() if f"lora_{letter}" in name], "lr": rate}
        for letter, rate in (("A", lr), ("B", lr * plus))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    losses: list[float] = []
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
        losses.append(float(total / count))
        first = first or {name.replace(".default", ""): parameter.grad.clone() for name, parameter in trained.items()}
        optimizer.step()
    state = get_peft_model_state_dict(model)
    return losses, first, {name: tensor.detach().clone() for name, tensor in state.items()}
