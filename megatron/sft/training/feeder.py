"""The micro-batches of this process, made from positions in the data by a thread that is one step ahead."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron.sft.data.reference_logps import ReferenceLogps
from megatron.sft.data.row_order import RowOrder, num_split_groups
from megatron.sft.data.tokenized import Row
from megatron.sft.model.context_parallel import ContextPart
from megatron.sft.planning.objective_checks import needs_pairs
from megatron.sft.planning.run_plan import RunPlan
from megatron.sft.runtime import device, ranks
from megatron.sft.runtime.errors import UserError

if TYPE_CHECKING:
    from megatron.sft.model.inputs import MicroBatch

Numbers = list[int | None]  # row numbers; None stands for a blank row


class Feeder:
    """Makes this process's micro-batches from positions in the data. Every rank of a model-parallel group reads the same."""

    def __init__(self, plan: RunPlan, reference: ReferenceLogps | None = None) -> None:
        """reference: its log-probabilities go with the rows."""
        from megatron.core import parallel_state

        self.plan, self.reference = plan, reference
        continues_group = plan.rows.continues_group[plan.training_rows]
        self.order = RowOrder(plan.training_rows, plan.options.seed, continues_group, plan.options.global_batch_size)
        if continues_group.any() and (torn := num_split_groups(self.order)):
            ranks.print_rank_0(
                f"{torn:,} groups are larger than a global batch or do not fit into one: each is split between two"
            )
        self.rank = parallel_state.get_data_parallel_rank()
        self.part = ContextPart(parallel_state.get_context_parallel_rank(), plan.layout.context_parallel)
        # Sequence parallelism splits a micro-batch into equal parts; GPU kernels like multiples of 128.
        tensor_parallel = plan.layout.tensor_parallel if plan.layout.sequence_parallel else 1
        self.alignment = (128 if device.has_gpu() else 1) * tensor_parallel
        self.device = device.current()  # another thread would get the first GPU
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._ahead: dict[int, Future[list[MicroBatch]]] = {}

    def training(self, consumed: int) -> list["MicroBatch"]:
        """The micro-batches of the step that starts after `consumed` rows; making the next step's begins."""
        size = self.plan.options.global_batch_size
        due = self._ahead.pop(consumed, None) or self._worker.submit(self._training, consumed)
        self._ahead = {consumed + size: self._worker.submit(self._training, consumed + size)}
        return due.result()

    def _training(self, consumed: int) -> list["MicroBatch"]:
        return [self.micro_batch(numbers) for numbers in self.training_numbers(consumed)]

    def training_numbers(self, consumed: int) -> list[Numbers]:
        """The row numbers of this process's micro-batches in the step that starts after `consumed` rows."""
        return self.shared([self.order.row_at(consumed + i) for i in range(self.plan.options.global_batch_size)])

    def validation(self, index: int) -> list["MicroBatch"]:
        """The micro-batches of the `index`-th global batch of validation rows; missing rows at the end are blank."""
        size = self.plan.options.global_batch_size
        numbers = [int(n) for n in self.plan.validation_rows[index * size : (index + 1) * size]]
        return [self.micro_batch(part) for part in self.shared([*numbers, *[None] * (size - len(numbers))])]

    def shared(self, numbers: Numbers) -> list[Numbers]:
        """This process's part of a global batch, micro-batch by micro-batch."""
        size, copies = self.plan.options.micro_batch_size, self.plan.data_parallel
        firsts = ((index * copies + self.rank) * size for index in range(self.plan.num_micro_batches))
        return [numbers[first : first + size] for first in firsts]

    def single_rows(self, numbers: Sequence[int]) -> Numbers:
        """This process's part of these rows, a global batch at most, to be computed one by one; blank ones where rows are
        missing."""
        missing = self.plan.options.global_batch_size - len(numbers)
        return [number for part in self.shared([*numbers, *[None] * missing]) for number in part]

    def micro_batch(self, numbers: Numbers) -> "MicroBatch":
        """The micro-batch of these rows."""
        return self.batch_of([self.row(number) for number in numbers])

    def batch_of(self, rows: list[Row]) -> "MicroBatch":
        """The micro-batch of rows that were read already."""
        from megatron.sft.training.batches import make_micro_batch

        return make_micro_batch(
            rows,
            self.alignment,
            self.plan.options.loss_average,
            self.device,
            part=self.part,
            num_sources=self.plan.rows.num_sources,
            has_pairs=needs_pairs(self.plan.options.objective),
        )

    def row(self, number: int | None) -> Row:
        """One row, or the blank one for None. A row that cannot be read is a `UserError` that names it."""
        from megatron.sft.training.batches import blank_row

        if number is None:
            return blank_row()
        try:
            row = self.plan.rows[number]
            return row if self.reference is None else replace(row, reference=self.reference.of_row(number))
        except (OSError, ValueError, IndexError) as error:
            raise UserError(
                f"row {number} of {self.plan.rows.prefix} cannot be read ({error}): check the disk, or run "
                "scripts/3_tokenize.sh again"
            ) from error
