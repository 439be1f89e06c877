"""A tiny model with an adapter, PEFT's training of it, and ours in any layout."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.sft.data.row_order import RowOrder, split_rows
from tests.support import peft_oracle, tiny
from tests.support.layout_worker import stored_tensors

WORKER = Path(__file__).parent / "lora_worker.py"
LR, STEPS, ROWS, NUM_ROWS, LENGTH = 1e-4, 5, 4, 16, 96
OPTIONS = ["--precision", "fp32", "--lr", str(LR), "--min-lr", str(LR), "--lr-decay-style", "constant", "--adam-eps", "1e-6"]
OPTIONS += ["--lr-warmup-iters", "0", "--clip-grad", "0", "--train-iters", str(STEPS), "--save-interval", "1"]
OPTIONS += ["--global-batch-size", str(ROWS), "--micro-batch-size", "1", "--split", "100,0,0"]
TP, PP, CP, EP = (f"--{name}-model-parallel-size" for name in ("tensor", "pipeline", "context", "expert"))
CP, SP, VPP = "--context-parallel-size", "--sequence-parallel", "--num-virtual-stages-per-pipeline-rank"
# Processes and options. PP2 of five layers is uneven.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1x1": (1, []),
    "TP2": (2, [TP, "2"]),
    "TP2 + SP": (2, [TP, "2", SP, "1"]),
    "PP2": (2, [PP, "2"]),
    "PP2 x VPP2": (2, [PP, "2", VPP, "2"]),
    "CP2": (2, [CP, "2"]),
    "DP2": (2, []),
    "EP2": (2, [EP, "2"]),
    "EP2 x TP2": (2, [EP, "2", TP, "2"]),
    "TP2 x PP2": (4, [TP, "2", PP, "2"]),
    "TP2 + SP x CP2": (4, [TP, "2", SP, "1", CP, "2"]),
    "EP2 x TP2 x DP2": (4, [EP, "2", TP, "2"]),
    "EP2 x PP2": (4, [EP, "2", PP, "2"]),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Case:
    """A family of tiny_families.py with data. elsewhere: transformers 4.57 makes and trains it."""

    def __init__(self, folder: Path, family: str, elsewhere: bool = False, **config: Any) -> None:
        self.folder, self.model, self.adapter = folder, folder / "hf", folder / "adapter"
        self.elsewhere = elsewhere
        (peft_oracle.make_elsewhere if elsewhere else peft_oracle.make)(folder, family, **config)
        tiny.run_module("convert", "--source", self.model, "--output", folder / "mcore")
        rows = tiny.random_rows(NUM_ROWS, LENGTH)
        self.data = tiny.write_rows(folder / "data", rows, LENGTH)
        training, _ = split_rows(NUM_ROWS, 1.0, 0.0, seed=1234)
        order = RowOrder(training, seed=1234)
        self.steps = [[c for i in range(ROWS) for c in rows[order.row_at(ROWS * step + i)]] for step in range(STEPS)]
        self._expected: dict[str, peft_oracle.Trained] = {}

    def with_adapter(self, name: str, **config: Any) -> "Case":
        """The same model and data with another adapter."""
        other = copy.copy(self)
        other.adapter, other._expected = peft_oracle.save_adapter(self.model, self.folder / name, **config), {}
        return other

    def expected(self, plus: float = 1.0) -> peft_oracle.Trained:
        """What PEFT makes of the adapter."""
        key = f"adapter {plus}"
        if key not in self._expected:
            self._expected[key] = (
                peft_oracle.train_elsewhere(self.folder, self.steps, LR)
                if self.elsewhere
                else peft_oracle.train(self.model, self.adapter, self.steps, LR, plus)
            )
        return self._expected[key]

    def train(
        self, layout: str, *options: str, name: str = "", mode: str = "train", adapter: bool = True, on_gpu: bool = False
    ) -> Path:
        """Our run from the adapter, or with the adapter that `options` describe; its folder."""
        processes, more = LAYOUTS[layout]
        out = self.folder / (name or f"{layout} {' '.join(options).replace('/', '_')}")
        given = ["--load", self.folder / "mcore", "--data-path", self.data, "--save", out, *OPTIONS, *more]
        given += ["--lora-init-from", self.adapter] if adapter else []
        launch = tiny.run_on_gpu if on_gpu else tiny.run
        checked = adapter or "--lora-rank" in options
        launch(processes, str(WORKER) if checked else "megatron.sft.train", mode, *given, *options)
        return out

    def expected_of(self, frozen: str, clip: float = 0.0) -> peft_oracle.Trained:
        """What transformers makes of the model itself, without gradients for the names that `frozen` finds."""
        key = f"{frozen} {clip}"
        if key not in self._expected:
            self._expected[key] = peft_oracle.train(self.model, None, self.steps, LR, frozen=frozen, clip=clip)
        return self._expected[key]

    def assert_as_peft(self, run: Path, plus: float = 1.0) -> None:
        """Losses, norms and first gradients of both factors to 1e-5 of their size, weights after all steps to 1e-5."""
        expected = self.expected(plus)
        assert tiny.losses(run) == pytest.approx(expected.losses, rel=1e-5)
        assert [line["grad_norm"] for line in tiny.metrics(run)] == pytest.approx(expected.norms, rel=1e-5)
        first, last = (stored_tensors(run / f"iter_{step:07d}") for step in (1, STEPS))
        assert_only_adapters(last, set(expected.weights))
        for name, gradient in expected.gradients.items():
            ours = first[f"optimizer.state.exp_avg.{name}"] / 0.1
            assert (ours - gradient).norm() <= 1e-5 * gradient.norm() and gradient.any(), name
        for name, weight in expected.weights.items():
            difference = (last[f"optimizer.state.param.{name}"] - weight).abs().max()
            assert difference <= 1e-5, (name, difference)


def assert_only_adapters(stored: dict[str, torch.Tensor], names: set[str]) -> None:
    """A checkpoint has these adapters, and their masters and moments in float32, and nothing else."""
    kinds = [f"optimizer.state.{kind}." for kind in ("param", "exp_avg", "exp_avg_sq")]
    assert stored.keys() == names | {kind + name for kind in kinds for name in names}
    assert all(tensor.dtype == torch.float32 for name, tensor in stored.items() if name.startswith("optimizer"))
