"""The benchmark of pairs, both stacks whole, on the CPU with a tiny model: what a GPU then measures at full size."""

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


def measure() -> None:
    from benchmarks import peer_dpo, train

    arguments = train.parse(sys.argv[1:])
    rows = train._rows(arguments, tiny.VOCAB_SIZE, 16)
    seconds, losses, _ = train._steps(arguments, rows)
    used = rows.used(arguments.warm_up, arguments.steps, arguments.micro_batches)
    pairs, padding = sum(rows.counts[index].pairs for index in used) / arguments.steps, 0.0
    if arguments.stack == "peer":
        pairs = len(peer_dpo.pairs_of_steps(arguments, rows)[0]) / (arguments.steps + arguments.warm_up)
        padding = peer_dpo.peer_padding(arguments, rows)
    print(json.dumps({"seconds": seconds, "losses": losses, "pairs": pairs, "padding": padding}))


if __name__ == "__main__":
    measure()
