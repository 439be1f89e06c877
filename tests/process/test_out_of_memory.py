"""A run whose GPU is full: the message of the real command, with a CUDA allocator that is made to fail on a CPU."""

import json
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from tests.support import tiny

GIB = 2**30
WANTED = "CUDA out of memory. Tried to allocate 2.00 GiB."


def _run(part: str, arguments: list[str]) -> int:
    """A run whose `part` does not find the memory; the GPU has 1.5 GiB, of which 0.75 are allocated here."""
    import torch

    from megatron.sft import train
    from megatron.sft.runtime.errors import run
    from megatron.sft.training import loop

    cuda: Any = torch.cuda
    cuda.mem_get_info = lambda *_: (0, 3 * GIB // 2)
    cuda.memory_reserved = cuda.memory_allocated = lambda *_: 3 * GIB // 4

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise torch.OutOfMemoryError(f"{WANTED}\nadvice of torch")

    if part == "building":
        loop.Engine.__init__ = fail  # type: ignore[method-assign]
    elif part == "optimizer step":
        build = loop.Engine.__init__

        def build_and_break(self: Any, plan: Any) -> None:
            build(self, plan)
            self.optimizer.step = fail

        loop.Engine.__init__ = build_and_break  # type: ignore[method-assign]
    else:
        loop.Engine.evaluate = fail  # type: ignore[method-assign]
    run(lambda: train.main(arguments))


def test_phase_parts_and_the_change_that_fits_are_named(converted: Path, packed_rows: Path, tmp_path: Path) -> None:
    options = ["--load", converted, "--data-path", packed_rows, "--train-iters", 2, "--global-batch-size", 4, "--lr", 1e-3]
    options += ["--split", "90,10,0", "--precision", "bf16", "--recompute", "auto", "--gpu-memory-gib", 1.5]
    options += ["--validate-at-start", 1]
    for part in ("building", "optimizer step", "validation"):
        here = options[:-2] if part == "optimizer step" else options
        output = tiny.run(0, __file__, part, *here, "--save", tmp_path / part, status=2)
        error = next(line for line in output.splitlines() if line.startswith("error: "))
        assert f"is full in {part} ({WANTED}" in error and "advice" not in error
        assert "the cheapest change that fits is " in error or "no change of one or two settings fits" in error
        # What was chosen is said when it is, and not where the message compares with it.
        assert output.count("the cheapest that is estimated to fit") == (part != "building")
        if part == "building":
            continue
        sizes = re.search(
            r"weights (\S+) \(plan: (\S+)\), gradients \S+ .*, optimizer \S+ .*memory (\S+) \(plan: (\S+)\)", error
        )
        assert sizes, error
        assert sizes[1] == sizes[2] == "0.0" and sizes[3] == "0.7"
        assert "activations and working memory took 0.7 GiB more than planned" in error


def test_what_a_built_run_holds_is_what_is_planned(tmp_path: Path) -> None:
    output = tiny.run_script(Path(__file__), "held", tiny.save_qwen2(tmp_path / "model", tied=True))
    held, planned = json.loads(output.strip().splitlines()[-1])
    for name, size in planned.items():
        # Buffers are padded, and AdamW's state is in float32.
        assert abs(held[name] / size - 1) < 0.06, (name, held, planned)


def _held(model: str) -> None:
    from benchmarks import ours, rows, train
    from megatron.sft.model import process_groups
    from megatron.sft.planning.memory import estimate
    from megatron.sft.runtime import device

    device.prepare()
    from megatron.sft.training.engine import Engine, memory_of
    from megatron.sft.training.feeder import Feeder
    from megatron.sft.training.steering.out_of_memory import held_parts

    arguments = train.parse(["--model", model, "--row-length", "128", "--steps", "2", "--warm-up", "1", "--precision", "bf16"])
    plan = ours.benchmark_plan(arguments, rows.make_rows(128, "64,64", 1.0, tiny.VOCAB_SIZE, 8))
    with process_groups.parallel(plan.layout):
        engine = Engine(plan)
        ours.randomize(engine)
        engine.train_step(Feeder(plan).training(0))
        expected = estimate(plan.architecture, plan.layout, 1, memory_of(plan)).parts()
        planned = {name: expected[name] for name in ("weights", "gradients", "optimizer")}
        print(json.dumps((held_parts(engine, 1 << 30), planned)))


if __name__ == "__main__":
    if sys.argv[1] == "held":
        _held(sys.argv[2])
    else:
        _run(sys.argv[1], sys.argv[2:])
