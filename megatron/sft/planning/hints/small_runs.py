"""Runs that are too small for their settings, each named with the value to take. 3_tokenize, plan and train say the same."""

import math
from collections.abc import Iterator

from megatron.sft.families.architecture import Architecture
from megatron.sft.planning.options import TrainOptions
from megatron.sft.runtime.errors import UserError

FEWEST_STEPS = 10  # of a run by EPOCHS: fewer hardly move a model, and leave no room for a warm-up
STEPS_AN_EPOCH = 20  # that a suggested batch leaves, where there are as many rows
MOST_EPOCHS = 20.0  # more of them learn the rows by heart
USUAL_EPOCHS = 3
_SPLITS = ((99, 1), (98, 2), (95, 5), (90, 10), (80, 20), (50, 50))


def fitting_batch(num_rows: int, multiple: int = 1) -> int:
    """A GLOBAL_BATCH_SIZE with which this many rows make enough steps: a multiple of what all processes take at once."""
    return multiple << max(0, (num_rows // STEPS_AN_EPOCH // multiple).bit_length() - 1)


def fitting_split(num_rows: int) -> str:
    """A SPLIT that leaves at least one validation row; empty if there is only one row."""
    return next((f"{train},{held},0" for train, held in _SPLITS if num_rows * held // 100 >= 1), "")


def check_positions(length: int, architecture: Architecture, where: str) -> None:
    """A `UserError` for rows longer than the model has positions."""
    if length > architecture.max_positions:
        raise UserError(
            f"LENGTH is {length}, the model has {architecture.max_positions} positions ({where}): take at most "
            f"{architecture.max_positions}"
        )


def data_notes(num_rows: int, num_conversations: int) -> Iterator[str]:
    """What the default settings would make of tokenised data with so few rows."""
    batch = TrainOptions.global_batch_size
    if num_rows >= batch * FEWEST_STEPS:
        return
    steps = math.ceil(num_rows / batch)
    take = fitting_batch(num_rows)
    yield (
        f"few rows ({num_rows:,}: {steps} step{'s' * (steps > 1)} of the default GLOBAL_BATCH_SIZE={batch}): take {take}, for "
        f"{math.ceil(num_rows / take):,} steps of about {take * num_conversations / num_rows:,.0f} conversations"
    )


def run_notes(options: TrainOptions, rows: tuple[int, int], train_iters: int, data_parallel: int) -> Iterator[str]:
    """What is too small of a run. rows: for training and for validation."""
    num_rows, num_validation = rows
    batch, multiple = options.global_batch_size, options.micro_batch_size * data_parallel
    take = fitting_batch(num_rows, multiple)
    epochs = train_iters * batch / num_rows
    if batch > num_rows:
        yield (
            f"GLOBAL_BATCH_SIZE={batch} is more than the {num_rows:,} training rows, so that a step repeats rows: take "
            f"GLOBAL_BATCH_SIZE={take}"
        )
    elif not options.train_iters and train_iters < FEWEST_STEPS and take < batch:
        yield (
            f"EPOCHS={options.epochs:g} of {num_rows:,} rows are {train_iters} step{'s' * (train_iters > 1)}: take "
            f"GLOBAL_BATCH_SIZE={take}, or more EPOCHS"
        )
    if epochs > MOST_EPOCHS and options.train_iters:
        yield (
            f"TRAIN_ITERS={train_iters} goes {epochs:,.0f} times through the {num_rows:,} training rows: take "
            f"TRAIN_ITERS={math.ceil(USUAL_EPOCHS * num_rows / min(batch, max(take, 1)))} with GLOBAL_BATCH_SIZE="
            f"{min(batch, max(take, 1))} ({USUAL_EPOCHS} epochs), or EPOCHS instead of it"
        )
    asked = [float(part) for part in options.split.split(",")][1:2]
    if asked and asked[0] > 0 and not num_validation:
        advice = fitting_split(num_rows)
        yield (
            f"SPLIT={options.split} leaves no validation row of {num_rows:,}: "
            + (f"take SPLIT={advice}" if advice else "take shorter rows, so that there are several, or SPLIT=100,0,0")
        )
