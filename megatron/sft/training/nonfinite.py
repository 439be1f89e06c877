"""Finding the conversations, or pairs, whose loss or gradient is not finite, after a step that was skipped because of them."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.sft.data.tokenized import Row
from megatron.sft.planning.objective_checks import needs_pairs
from megatron.sft.training.feeder import Feeder

if TYPE_CHECKING:
    from megatron.sft.training.engine import Engine

# Conversations are tried one by one, in at most this many micro-batches of each data-parallel copy and at most this many.
_MICRO_BATCHES, _CONVERSATIONS = 3, 256
_NAMED = 5


@dataclass(frozen=True)
class Found:
    """A row, or one of its conversations or pairs, that gives gradients that are not finite. These count from 1."""

    row: int
    part: int = 0
    parts: int = 0
    kind: str = "conversation"

    def __str__(self) -> str:
        part = f", {self.kind} {self.part} of {self.parts}" if self.part else ""
        return f"row {self.row}{part}"


def blame(engine: "Engine", feeder: Feeder, consumed: int) -> str:
    """Which rows of the step after `consumed` rows are to blame, in words. Every rank must call it; all get the same text.

    The micro-batches of the step are recomputed, first whole, then conversation by conversation.
    """
    numbers = feeder.training_numbers(consumed)  # of rows, micro-batch by micro-batch
    bad = _bad(engine, feeder.rank, [feeder.micro_batch(part) for part in numbers])
    rows = {n: feeder.row(n) for index in bad[:_MICRO_BATCHES] for n in numbers[index] if n is not None}
    kind, size = ("pair", 2) if needs_pairs(feeder.plan.options.objective) else ("conversation", 1)
    tried = [(n, i) for n, row in rows.items() for i in range(len(row.conversation_lengths) // size)][:_CONVERSATIONS]
    singles = [feeder.batch_of([_part(rows[n], i * size, size)]) for n, i in tried]
    # Every rank must compute as many micro-batches as the others.
    singles += [feeder.micro_batch([None])] * (max(_gathered(len(tried))) - len(tried))
    guilty = [tried[index] for index in _bad(engine, feeder.rank, singles) if index < len(tried)]
    found = [Found(n, i + 1, len(rows[n].conversation_lengths) // size, kind) for n, i in guilty]
    if not found:
        found = [Found(n) for index in bad for n in numbers[index] if n is not None]
    everywhere = len(bad) == len(numbers)
    return _words(feeder, _gathered((found, everywhere)))


def _words(feeder: Feeder, answers: "list[tuple[list[Found], bool]]") -> str:
    found = sorted({each for some, _ in answers for each in some}, key=lambda each: (each.row, each.part))
    if not found:
        return "recomputed, it is finite: check the hardware"
    prefix = feeder.plan.rows.prefix
    names = "; ".join(map(str, found[:_NAMED])) + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
    everywhere = all(every for _, every in answers) and feeder.plan.options.global_batch_size > 1
    cause = ", every micro-batch of the step: the weights, or LR, rather than the data" if everywhere else ""
    return f"{names} of {prefix}{cause} (tools/show_sample {prefix} {found[0].row})"


def _bad(engine: "Engine", copy: int, batches: list[Any]) -> list[int]:
    """The indices of the micro-batches that give some rank of this copy of the model gradients that are not finite."""
    mine = [index for index, batch in enumerate(batches) if not engine.has_finite_gradients(batch)]
    return sorted({index for other, indices in _gathered((copy, mine)) if other == copy for index in indices})


def _part(row: Row, index: int, size: int) -> Row:
    """The conversations from `index` on, as many as `size`."""
    lengths = row.conversation_lengths[index : index + size]
    start = int(row.conversation_lengths[:index].sum())
    part = slice(start, start + int(lengths.sum()))
    first = int(row.trained[:start].sum())
    reference = None if row.reference is None else row.reference[first : first + int(row.trained[part].sum())]
    return Row(row.tokens[part], row.trained[part], lengths, reference=reference)


def _gathered(value: Any) -> list[Any]:
    """The value of every rank."""
    import torch

    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


@dataclass
class SpikeWatch:
    """Warns of a logged loss that is far above the ones before it: more than 6 standard deviations and 20 % above the mean of
    the last 50, once there are 20. A resumed run starts with no history."""

    window: int = 50
    least: int = 20

    def __post_init__(self) -> None:
        self._losses: list[float] = []

    def look(self, loss: float) -> str:
        """A warning in words, or an empty text."""
        before, self._losses = self._losses, [*self._losses[-self.window + 1 :], loss]
        if len(before) < self.least:
            return ""
        mean = sum(before) / len(before)
        deviation = math.sqrt(sum((each - mean) ** 2 for each in before) / len(before))
        if loss <= mean + max(6 * deviation, 0.2 * abs(mean)):
            return ""
        return f"loss {loss:.4f} is far above the last {len(before)} ({mean:.4f} ± {deviation:.4f})"
