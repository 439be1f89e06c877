"""What a step on pairs costs next to SFT's, and the benchmark of pairs, both stacks whole, on the CPU with a tiny model: what a
GPU then measures at full size."""

import json
import sys
from pathlib import Path

import pytest

from tests.support import tiny

WORDS = ["--objective", "dpo", "--row-length", "256", "--pair-means", "24,30", "--micro-batches", "2", "--peer-pairs", "2"]
WORDS += ["--steps", "3", "--warm-up", "1"]


@pytest.mark.timeout(300)
def test_our_stack_sft_and_trls_trainer_measure_the_same_pairs(tmp_path: Path) -> None:
    model = tiny.save_qwen2(tmp_path / "model", tied=False)
    found = {}
    for stack in ("ours", "sft", "peer"):
        output = tiny.run_script(Path(__file__), "--model", model, *WORDS, "--stack", stack)
        found[stack] = json.loads(output.strip().splitlines()[-1])
    for stack in found.values():
        assert len(stack["seconds"]) == len(stack["losses"]) == 3
    assert found["ours"]["pairs"] == found["sft"]["pairs"] and found["ours"]["padding"] == 0
    # The peer takes whole micro-batches of the same pairs, one after another.
    assert abs(found["peer"]["pairs"] - found["ours"]["pairs"]) <= 1
    assert 0.1 < found["peer"]["padding"] < 0.8
    # Random weights against a reference that guesses: both are near ln 2.
    for stack in ("ours", "peer"):
        assert all(0.3 < loss < 2 for loss in found[stack]["losses"]), found


def test_a_step_on_pairs_costs_that_of_sft_and_one_more_head_forward(tmp_path: Path) -> None:
    """Matrix products of one step on the same rows, counted; the largest tensor is the same too."""
    model = tiny.save_qwen2(tmp_path / "model", tied=False)
    found = {}
    for stack in ("ours", "sft"):
        output = tiny.run_script(Path(__file__), "--model", model, *WORDS, "--stack", stack, "--profile", "count")
        found[stack] = json.loads(output.strip().splitlines()[-1])
    pairs, sft = found["ours"], found["sft"]
    assert pairs["trained"] == sft["trained"] > 0
    assert pairs["operations"] - sft["operations"] == 2 * pairs["trained"] * pairs["hidden"] * pairs["vocabulary"]
    assert pairs["largest"] == sft["largest"]


def count() -> None:
    """The operations of two training steps, and the elements of the largest tensor that one makes."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import ours, train
    from megatron.sft.training.engine import Engine

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, call, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = call(*args, **(kwargs or {}))
            for each in result if isinstance(result, tuple | list) else [result]:
                if isinstance(each, torch.Tensor):
                    self.elements = max(self.elements, each.numel())
            return result

    arguments = train.parse(sys.argv[1:])
    arguments.profile, arguments.steps, arguments.warm_up = "", 2, 0
    rows, largest = train.rows_of(arguments, tiny.VOCAB_SIZE, 16), Largest()
    step, seen = Engine.train_step, {"trained": 0, "operations": 0}

    def counted(engine: Engine, batches: object) -> object:
        seen["hidden"] = engine.plan.architecture.hidden_size
        seen["vocabulary"] = engine.plan.layout.padded_vocab_size(engine.plan.architecture)
        seen["trained"] += sum(len(batch.targets.ids) for batch in batches)  # type: ignore[attr-defined]
        with FlopCounterMode(display=False) as counter, largest:
            result = step(engine, batches)  # type: ignore[arg-type]
        seen["operations"] += counter.get_total_flops()
        return result

    Engine.train_step = counted  # type: ignore[assignment,method-assign]
    ours.measure_steps(arguments, rows)
    print(json.dumps({**seen, "largest": largest.elements}))


def measure() -> None:
    from benchmarks import peer_dpo, train

    arguments = train.parse(sys.argv[1:])
    rows = train.rows_of(arguments, tiny.VOCAB_SIZE, 16)
    seconds, losses, *_ = train._steps(arguments, rows)
    used = rows.used(arguments.warm_up, arguments.steps, arguments.micro_batches)
    pairs, padding = sum(rows.counts[index].pairs for index in used) / arguments.steps, 0.0
    if arguments.stack == "peer":
        pairs = len(peer_dpo.pairs_of_steps(arguments, rows)[0]) / (arguments.steps + arguments.warm_up)
        padding = peer_dpo.peer_padding(arguments, rows)
    print(json.dumps({"seconds": seconds, "losses": losses, "pairs": pairs, "padding": padding}))


if __name__ == "__main__":
    count() if "--profile" in sys.argv else measure()
