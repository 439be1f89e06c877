"""LoRA at every layout equals PEFT's: losses, gradients of both factors, weights after five steps of AdamW."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.sft.data.row_order import RowOrder, split_rows
from tests.support import peft_oracle, tiny
from tests.support.layout_worker import stored_tensors

WORKER = Path(__file__).parents[1] / "support" / "lora_worker.py"
LR, STEPS, ROWS = 1e-4, 5, 4
OPTIONS = ["--precision", "fp32", "--lr", str(LR), "--min-lr", str(LR), "--lr-decay-style", "constant", "--adam-eps", "1e-6"]
OPTIONS += ["--lr-warmup-iters", "0", "--clip-grad", "0", "--train-iters", str(STEPS), "--save-interval", "1"]
OPTIONS += ["--global-batch-size", str(ROWS), "--micro-batch-size", "1"]
TP, PP, SP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--sequence-parallel"
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1x1": (1, []),
    "TP2": (2, [TP, "2"]),
    "TP2 + sequence parallel": (2, [TP, "2", SP, "1"]),
    "PP2": (2, [PP, "2"]),
    "TP2 x PP2": (4, [TP, "2", PP, "2"]),
    "DP2": (2, []),
}


class Case:
    """A family with an adapter, and PEFT's training of it."""

    def __init__(self, folder: Path, family: str, **config: Any) -> None:
        self.folder = folder
        self.model = tiny.save_family(folder / "hf", family)
        self.adapter = peft_oracle.save_adapter(self.model, folder / "adapter", **config)
        tiny.run_module("convert", "--source", self.model, "--output", folder / "mcore")
        rows = tiny.random_rows(16, 96)
        self.data = tiny.write_rows(folder / "data", rows, 96)
        training, _ = split_rows(16, 1.0, 0.0, seed=1234)
        order = RowOrder(training, seed=1234)
        steps = [[c for i in range(ROWS) for c in rows[order.row_at(ROWS * step + i)]] for step in range(STEPS)]
        self.losses, self.gradients, self.weights = peft_oracle.train(self.model, self.adapter, steps, LR)

    def train(self, layout: tuple[int, list[str]], *options: str, name: str = "run", on_gpu: bool = False) -> Path:
        processes, more = layout
        out = self.folder / name
        given = ["--load", self.folder / "mcore", "--data-path", self.data, "--save", out, "--lora-init-from", self.adapter]
        launch = tiny.run_on_gpu if on_gpu else tiny.run
        launch(processes, str(WORKER), "train", *given, *OPTIONS, *more, *options)
        return out

    def assert_as_peft(self, run: Path) -> None:
        assert tiny.losses(run) == pytest.approx(self.losses, rel=1e-5)
        first, last = (stored_tensors(run / f"iter_{step:07d}") for step in (1, STEPS))
        for name, gradient in self.gradients.items():
            ours = first[f"optimizer.state.exp_avg.{name}"] / 0.1
            assert (ours - gradient).norm() <= 1e-5 * gradient.norm(), name
        for name, weight in self.weights.items():
            difference = (last[f"optimizer.state.param.{name}"] - weight).abs().max()
            assert difference <= 1e-5, (name, difference)


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    made: dict[str, Case] = {}

    def make(family: str, **config: Any) -> Case:
        key = f"{family}{config}"
        if key not in made:
            made[key] = Case(tmp_path_factory.mktemp(family), family, **config)
        return made[key]

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen2"])
def test_adapters_train_as_in_peft(case_of: Callable[..., Case], family: str, layout: str) -> None:
    case = case_of(family, target_modules=TARGETS)
    case.assert_as_peft(case.train(LAYOUTS[layout], name=f"run {layout}"))


GPU_LAYOUTS = {**LAYOUTS, "CP2": (2, ["--context-parallel-size", "2"])}


@pytest.mark.gpu
@pytest.mark.parametrize("layout", GPU_LAYOUTS)
def test_adapters_train_as_in_peft_on_gpus(case_of: Callable[..., Case], layout: str) -> None:
    processes = GPU_LAYOUTS[layout][0]
    if torch.cuda.device_count() < processes:
        pytest.skip(f"{processes} GPUs are needed")
    case = case_of("qwen2", target_modules=TARGETS)
    case.assert_as_peft(case.train(GPU_LAYOUTS[layout], name=f"gpu {layout}", on_gpu=True))
