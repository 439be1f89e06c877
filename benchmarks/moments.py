"""How far AdamW with rounded moments gets from AdamW in float64 on the gradients of a real run; a minute or two on a CPU.

python -m benchmarks.moments [--steps 250] [--beta2 0.95]

transformers trains the quickstart's model on its task; every optimizer then takes the same gradients, in bfloat16. Printed is
the distance of its master weights from float64's, in percent of the way that those have gone. For comparison: the codes of
OPTIMIZER_PRECISION=8bit rounded to the nearest number, and the dynamic ones of Dettmers et al. (2022) in blocks of 256.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron.sft import quickstart
from megatron.sft.checkpoint.moment_codes import KINDS, decoded, empty_codes, set_codes
from megatron.sft.checkpoint.optimizer_state import join_master_weights
from megatron.sft.runtime.errors import OneLineParser, run
from megatron.sft.training.optimizers.adamw import InPlaceAdamW
from megatron.sft.training.optimizers.adamw_8bit import EightBitAdamW

_LR, _BETA1, _EPS, _DECAY = 3e-3, 0.9, 1e-8, 0.01
# A step's learning rate, and all gradients one after another.
Steps = list[tuple[float, Tensor]]
Rounding = Callable[[Tensor, str], Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="benchmarks.moments", description=__doc__)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--beta2", type=float, default=0.95)
    arguments = parser.parse_args(argv)
    start, steps = gradients(arguments)
    exact = by_formula(start, steps, arguments.beta2, lambda values, kind: values)
    ways: dict[str, Callable[[], Tensor]] = {
        "16 bits": lambda: by_optimizer(InPlaceAdamW, start, steps, arguments.beta2),
        "8 bits": lambda: by_optimizer(EightBitAdamW, start, steps, arguments.beta2),
        "8 bits, nearest": lambda: by_formula(start, steps, arguments.beta2, nearest),
        "dynamic codes": lambda: by_formula(start, steps, arguments.beta2, dynamic),
    }
    for name, weights_after in ways.items():
        print(f"{name}: {100 * float((weights_after() - exact).norm() / (exact - start).norm()):.1f} %", flush=True)
    return 0


def gradients(arguments: argparse.Namespace) -> tuple[Tensor, Steps]:
    """The first weights, float64, and what each step's gradients are where transformers trains with torch's AdamW."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        quickstart.main(["model", f"{folder}/model"])
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    records = [json.loads(line) for line in Path(quickstart.ASSETS / "train.json").read_text().splitlines()]
    draw, steps = random.Random(0), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, betas=(_BETA1, 0.99), weight_decay=_DECAY)
    start = torch.cat([each.detach().flatten() for each in model.parameters()]).bfloat16().double()
    for step in range(arguments.steps):
        pairs = [(record["instruction"], record["output"]) for record in draw.sample(records, 32)]
        turns = [
            [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)] for pair in pairs
        ]
        batch = tokenizer(
            [tokenizer.apply_chat_template(each, tokenize=False) for each in turns], return_tensors="pt", padding=True
        )
        lr = _LR * min(1, (step + 1) / 20) * (1 - 0.9 * step / arguments.steps)
        optimizer.param_groups[0]["lr"] = lr
        model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.append((lr, torch.cat([each.grad.flatten() for each in model.parameters()]).bfloat16()))
        optimizer.step()
        optimizer.zero_grad()
    return start, steps


def by_optimizer(kind: type[InPlaceAdamW], start: Tensor, steps: Steps, beta2: float) -> Tensor:
    """The master weights after all steps of one of our optimizers."""
    weights = start.bfloat16()
    optimizer = kind([weights], lr=_LR, betas=(_BETA1, beta2), eps=_EPS, weight_decay=_DECAY)
    for lr, gradient in steps:
        optimizer.param_groups[0]["lr"] = lr
        weights.decoupled_grad = gradient  # type: ignore[attr-defined]
        optimizer.step()
    return join_master_weights(weights, optimizer.state[weights]["master_param"]).double()


def by_formula(start: Tensor, steps: Steps, beta2: float, rounded: Rounding) -> Tensor:
    """The weights after all steps of AdamW in float64, with moments that are rounded after each."""
    weights, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step, (lr, gradient) in enumerate(steps, start=1):
        wide = gradient.double()
        first, second = _BETA1 * first + (1 - _BETA1) * wide, beta2 * second + (1 - beta2) * wide**2
        update = first / (1 - _BETA1**step) / ((second / (1 - beta2**step)).sqrt() + _EPS)
        weights = weights * (1 - lr * _DECAY) - lr * update
        first, second = rounded(first, KINDS[0]), rounded(second, KINDS[1])
    return weights


def nearest(values: Tensor, kind: str) -> Tensor:
    """The codes of OPTIMIZER_PRECISION=8bit, rounded to the nearest number."""
    state = empty_codes(values)
    set_codes(state, kind, values.float())
    return decoded(state, kind).double()


def dynamic(values: Tensor, kind: str) -> Tensor:
    """Dettmers et al. (2022): an exponent of ten in unary, then a linear fraction; relative to the largest of 256 elements."""
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 256)).view(-1, 256)
    largest = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-300)
    positive = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (kind == KINDS[1])) + 1, dtype=torch.float64)
        positive += (10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
    numbers = torch.tensor(sorted({sign * each for each in positive for sign in (1, -1)[: 1 + (kind == KINDS[0])]}))
    numbers = numbers.double()
    places = torch.bucketize(blocks / largest, (numbers[1:] + numbers[:-1]) / 2)
    return (numbers[places] * largest).view(-1)[: len(values)]


if __name__ == "__main__":
    run(main)
