"""The quickstart's model, untrained, and one that was taught four questions by heart in a few seconds of plain torch."""

import functools
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron.sft.quickstart import make_model_folder

PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
# question, direct answer, worked-out answer
TAUGHT = [
    ("Sort these names: Tom Ada", "<short> Ada Tom", "<think> Tom. Add Ada: Ada Tom. </think> Ada Tom"),
    ("Sort these names: Zoe Leo", "<short> Leo Zoe", "<think> Zoe. Add Leo: Leo Zoe. </think> Leo Zoe"),
    ("Sort these names: Ben Kim Eva", "<short> Ben Eva Kim", "<think> Ben. Add Kim: Ben Kim. </think> Ben Eva Kim"),
    ("Who are you?", "<short> Qwen", "<think> Hm, é. </think> Qwen"),
]


@functools.cache
def untrained_folder() -> Path:
    """A Hugging Face folder as `python -m megatron.sft.quickstart model` makes it."""
    folder = Path(tempfile.mkdtemp(prefix="untrained.")) / "quickstart"
    make_model_folder(folder)
    return folder


@functools.cache
def taught_folder() -> Path:
    """The same model after it was taught `TAUGHT`."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(untrained_folder())
    model = AutoModelForCausalLM.from_pretrained(untrained_folder())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
    batches = []
    for question, short, think in TAUGHT:
        for answer in (short, think):
            prompt = tokenizer(PROMPT.format(question)).input_ids
            ids = torch.tensor([prompt + tokenizer(answer + "<|im_end|>").input_ids])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            batches.append((ids, labels))
    for _ in range(60):
        loss = sum(model(input_ids=ids, labels=labels).loss for ids, labels in batches) / len(batches)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = Path(tempfile.mkdtemp(prefix="taught.")) / "taught"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
