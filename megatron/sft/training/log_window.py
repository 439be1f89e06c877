"""The steps between two log lines, summed on the device without waiting for it, and gathered from all ranks at the line."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.sft.model.experts.balance import ExpertLoad
from megatron.sft.model.inputs import MicroBatch
from megatron.sft.runtime import device
from megatron.sft.training.engine import StepResult


@dataclass(frozen=True)
class Totals:
    """Sums and means of a window over all processes and steps. source_losses, pairs: as in `StepMetrics`."""

    loss: float
    tokens: int
    trained_tokens: int
    sum_squared_lengths: int
    source_losses: dict[str, tuple[float, int]]
    memory_bytes: int
    pairs: dict[str, float]


@dataclass
class Window:
    """The applied steps since the last log line. started: time.monotonic() of its beginning."""

    started: float
    steps: int = 0
    tokens: int = 0
    sum_squared_lengths: int = 0
    sums: Tensor | None = None
    last: StepResult | None = None

    def add(self, batches: Sequence[MicroBatch], result: StepResult) -> None:
        """Count a step of these micro-batches."""
        self.sums = result.loss.values if self.sums is None else self.sums + result.loss.values
        self.last = result
        self.tokens += sum(batch.num_tokens for batch in batches)
        self.sum_squared_lengths += sum(batch.sum_squared_lengths for batch in batches)
        self.steps += 1

    def totals(self, model_size: int, source_names: Sequence[str]) -> Totals:
        """Totals over all processes; every rank must call it. Waits for the device.

        model_size: processes that hold one copy of the model together.
        """
        assert self.sums is not None and self.last is not None
        counts = [self.tokens, self.sum_squared_lengths, device.peak_memory_bytes()]
        mine = torch.cat([torch.tensor(counts, dtype=torch.float64, device=self.sums.device), self.sums])
        all_of_them = mine.new_empty(torch.distributed.get_world_size(), len(mine))
        torch.distributed.all_gather_into_tensor(all_of_them, mine[None])
        memory = int(all_of_them[:, 2].max())
        # Every model-parallel rank counted the tokens of its data-parallel copy.
        tokens, squares, _, *sums = all_of_them.sum(dim=0).tolist()
        means = self.last.loss.means(sums)
        return Totals(
            loss=means.loss,
            tokens=int(tokens) // model_size,
            trained_tokens=means.trained_tokens,
            sum_squared_lengths=int(squares) // model_size,
            source_losses=source_losses(means.source_sums, source_names),
            memory_bytes=memory,
            pairs=means.pairs,
        )


def expert_values(load: ExpertLoad | None) -> dict[str, float]:
    """`StepMetrics.experts`."""
    if load is None:
        return {}
    values = {"expert_load": load.mean, "expert_load_worst": load.worst, "expert_load_layer": load.worst_layer}
    return values if load.loss is None else {**values, "moe_aux_loss": load.loss}


def source_losses(sums: Sequence[float], names: Sequence[str]) -> dict[str, tuple[float, int]]:
    """Mean loss and trained tokens of each source, from its summed loss and its trained tokens, source after source."""
    pairs = zip(names, sums[::2], sums[1::2], strict=True)
    return {name: (loss / max(tokens, 1.0), int(tokens)) for name, loss, tokens in pairs}
