"""Packing changes no loss of pairs: a row's is that of its pairs alone, and no pair has an influence on another."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.sft.data.tokenized import Row
from tests.support import pair_material as material
from tests.support import tiny

NUM_ROWS, LENGTH = 6, 160
LAYOUTS = {
    "one stage": (1, []),
    "two stages": (2, ["--pipeline-model-parallel-size", "2"]),
    "shared rows": (2, ["--context-parallel-size", "2"]),
}
OBJECTIVES = {
    "dpo": ["--objective", "dpo", "--dpo-loss", "sigmoid_norm", "--dpo-ld-alpha", "0.5"],
    "orpo": ["--objective", "orpo"],
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_has_the_loss_of_its_pairs_alone(converted: Path, tmp_path: Path, layout: str, objective: str) -> None:
    data = material.write_pair_rows(tmp_path / "pairs", material.random_pair_rows(NUM_ROWS, LENGTH), LENGTH)
    num_processes, sizes = LAYOUTS[layout]
    arguments = ["--load", converted, "--data-path", data, "--save", tmp_path / "run", "--precision", "fp32"]
    arguments += ["--train-iters", "1", "--global-batch-size", "1", *OBJECTIVES[objective]]
    output = tiny.launch_test_worker(num_processes, Path(__file__), *arguments, *sizes)
    assert output.count(f"{NUM_ROWS} rows: all agree") == num_processes


def packed(pairs: list[material.Pair], reference: bool) -> Row:
    """Pairs as one row, with numbers of a reference that follow from each pair's own tokens."""
    answers = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    masks = [np.arange(len(prompt) + len(answer)) >= len(prompt) for prompt, answer in answers]
    tokens = np.concatenate([prompt + answer for prompt, answer in answers]).astype(np.int64)
    logps = np.concatenate([-3.0 - np.array(answer) / 100 for _, answer in answers]).astype(np.float32)
    lengths = np.array([len(mask) for mask in masks])
    return Row(tokens, np.concatenate(masks), lengths, reference=logps if reference else None)


def check_rows() -> None:
    """In each process: random rows through the real engine."""
    from megatron.core import parallel_state

    from megatron.sft.model.context_parallel import ContextPart
    from megatron.sft.model.process_groups import parallel
    from megatron.sft.planning.options import parse
    from megatron.sft.planning.resolution import plan_run
    from megatron.sft.runtime import device
    from megatron.sft.training import state
    from megatron.sft.training.batches import make_micro_batch
    from megatron.sft.training.engine import Engine

    device.prepare()
    mode, options = parse(["train", *sys.argv[1:]])
    plan = plan_run(mode, options, int(os.environ["WORLD_SIZE"]))
    with parallel(plan.layout, options.seed):
        part = ContextPart(parallel_state.get_context_parallel_rank(), plan.layout.context_parallel)
        engine = Engine(plan)
        state.load_start(engine)
        assert engine.objective is not None
        weigh, seen = engine.objective.weigh, []

        def record(pairs: Any, sft_scale: Any, token_losses: torch.Tensor) -> Any:
            weights, report = weigh(pairs, sft_scale, token_losses)
            seen.append(torch.stack([token_losses, weights]).split(pairs.num_targets.tolist(), dim=1))
            return weights, report

        engine.objective.weigh = record

        def evaluated(pairs: list[material.Pair]) -> tuple[dict[str, float], list[torch.Tensor]]:
            """Means over the pairs; of each answer the -log p and the weights of this rank's tokens, on the last stage."""
            seen.clear()
            row = packed(pairs, engine.objective.has_reference)
            means = engine.evaluate(
                [make_micro_batch([row], 1, "token", device.current(), part=part, has_pairs=True)]
            ).reduced()
            return {"loss": means.loss, **means.pairs}, list(seen[0]) if seen else []

        for seed in range(NUM_ROWS):
            (pairs,) = material.random_pair_rows(1, LENGTH, seed=100 + seed)
            check_one(pairs, evaluated, np.random.default_rng(seed))
    print(f"{NUM_ROWS} rows: all agree", flush=True)


def check_one(pairs: list[material.Pair], evaluated: Any, random: np.random.Generator) -> None:
    whole, answers = evaluated(pairs)
    alone = [evaluated([one])[0] for one in pairs]
    counts = np.array([len(pair.chosen) for pair in pairs])
    for name, value in whole.items():
        by_token = name == "sft_loss"
        if name != "loss" or "sft_loss" not in whole:
            expected = np.average([one[name] for one in alone], weights=counts if by_token else None)
            assert abs(value - expected) <= 1e-6 * max(1.0, abs(expected)), (name, value, expected)

    changed = int(random.integers(len(pairs)))
    other = [*pairs]
    old = pairs[changed]
    other[changed] = material.Pair([t % 7 + 1 for t in old.prompt], [t % 5 + 2 for t in old.chosen], old.rejected)
    _, answers_after = evaluated(other)
    assert len(answers) == len(answers_after) in (0, 2 * len(pairs))
    same = [torch.equal(a, b) for a, b in zip(answers, answers_after, strict=True)]
    for index, pair_is_same in enumerate(zip(same[0::2], same[1::2], strict=True)):
        held = [answers[2 * index].numel() > 0, answers[2 * index + 1].numel() > 0]
        # Of the changed pair everything changes, as far as this rank holds any of it.
        assert pair_is_same == (tuple(not any_held for any_held in held) if index == changed else (True, True))


if __name__ == "__main__":
    check_rows()
