"""Packing changes no loss: a packed row's is that of its conversations alone, and none of them sees another, on any stage."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.sft.data.tokenized import Row
from megatron.sft.model.context_parallel import ContextPart
from megatron.sft.training.batches import make_micro_batch
from tests.support import tiny

NUM_ROWS, ROW_LENGTH = 12, 96
LAYOUTS = {
    "one stage": (1, []),
    "two stages": (2, ["--pipeline-model-parallel-size", "2"]),
    "three stages": (3, ["--pipeline-model-parallel-size", "3"]),
    "shared rows": (2, ["--context-parallel-size", "2"]),
    "shared rows, two stages": (4, ["--context-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_row_has_the_loss_of_its_conversations_alone(
    converted: Path, packed_rows: Path, tmp_path: Path, layout: str
) -> None:
    num_processes, sizes = LAYOUTS[layout]
    arguments = ["--load", converted, "--data-path", packed_rows, "--save", tmp_path / "run", "--precision", "fp32"]
    arguments += ["--train-iters", "1", "--global-batch-size", "1", "--micro-batch-size", "1"]
    output = tiny.launch_test_worker(num_processes, Path(__file__), *arguments, *sizes)
    assert output.count(f"{NUM_ROWS} rows: all agree") == num_processes


def packed(conversations: list[tiny.Conversation], trained: int | None = None) -> Row:
    """Conversations as one row; trained: the only one whose answer is trained, None: all."""
    masks = [
        np.concatenate([np.zeros(len(prompt), dtype=bool), np.full(len(answer), trained in (None, index))])
        for index, (prompt, answer) in enumerate(conversations)
    ]
    tokens = np.concatenate([part for pair in conversations for part in pair]).astype(np.int64)
    lengths = np.array([len(prompt) + len(answer) for prompt, answer in conversations])
    return Row(tokens, np.concatenate(masks), lengths)


def check_rows() -> None:
    """In each process: random rows through the real engine, each part of the model on its stage."""
    from megatron.core import parallel_state

    from megatron.sft.model.process_groups import parallel
    from megatron.sft.planning.options import parse
    from megatron.sft.planning.resolution import plan_run
    from megatron.sft.runtime import device
    from megatron.sft.training import state
    from megatron.sft.training.engine import Engine

    device.prepare()
    mode, options = parse(["train", *sys.argv[1:]])
    plan = plan_run(mode, options, int(os.environ["WORLD_SIZE"]))
    with parallel(plan.layout, options.seed):
        part = ContextPart(parallel_state.get_context_parallel_rank(), plan.layout.context_parallel)
        engine = Engine(plan)
        state.load_start(engine)
        hidden: list[torch.Tensor] = []  # what this stage hands on, or to the loss
        engine.chunks[0].decoder.register_forward_hook(lambda *call: hidden.append(call[-1].detach().clone()))

        def loss(row: Row) -> tuple[float, int, list[torch.Tensor]]:
            hidden.clear()
            batch = make_micro_batch([row], 1, "token", device.current(), part=part)
            mean, count = engine.evaluate([batch]).reduce()
            lengths = -(-row.conversation_lengths // part.multiple) * part.multiple
            # This rank's part of each conversation.
            return mean, count, list(hidden[0].split((lengths // part.size).tolist()))

        for seed in range(NUM_ROWS):
            (conversations,) = tiny.random_rows(1, ROW_LENGTH, seed=100 + seed)
            check_one(conversations, loss, np.random.default_rng(seed))
    print(f"{NUM_ROWS} rows: all agree", flush=True)


def check_one(conversations: list[tiny.Conversation], loss, random: np.random.Generator) -> None:  # type: ignore[no-untyped-def]
    whole, num_trained, _ = loss(packed(conversations))
    alone = [loss(packed([one])) for one in conversations]
    assert num_trained == sum(count for _, count, _ in alone)
    expected = sum(mean * count for mean, count, _ in alone) / num_trained
    assert abs(whole - expected) <= 1e-6 * abs(expected), (whole, expected)

    changed = int(random.integers(len(conversations)))
    prompt, answer = conversations[changed]
    other = [*conversations]
    other[changed] = ((prompt + 1) % tiny.VOCAB_SIZE, (answer + 7) % tiny.VOCAB_SIZE)
    for index in range(len(conversations)):
        before, count, states = loss(packed(conversations, trained=index))
        after, _, states_after = loss(packed(other, trained=index))
        same_states = torch.equal(states[index], states_after[index])
        assert count == len(conversations[index][1])
        assert (before == after, same_states) == ((False, False) if index == changed else (True, True))


if __name__ == "__main__":
    check_rows()
