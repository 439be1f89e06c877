"""The first values of a run's adapters: PEFT's usual ones, or those of an adapter that is continued."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron.sft.hf.adapter_folder import AdapterFolder
from megatron.sft.planning.options import TrainOptions


def first_values(options: TrainOptions) -> Callable[[str, tuple[int, ...]], Tensor]:
    """A factor in float32 by PEFT's name and shape."""
    if options.lora_init_from:
        folder = AdapterFolder(Path(options.lora_init_from))
        return lambda name, shape: folder.tensor(name)
    return lambda name, shape: drawn_factor(name, shape, options.seed)


def drawn_factor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Zeros for B; for A uniform values within 1 / sqrt(inputs) (Kaiming's for a = sqrt(5)), the same at every layout."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
