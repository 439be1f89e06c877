"""Running micro-batches through megatron-core's schedules, with stages that know the shapes of what they send each other."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.sft.model.inputs import MicroBatch

_GROUPS = ["tp", "cp", "pp", "embd", "pos_embd", "dp_cp"]
Shapes = tuple[list[int], list[int]]


class RowPipeline(P2PCommunicator):
    """Transfers between pipeline stages of rows that differ in length.

    All stages have the same micro-batches, so each knows the shape of what comes next. megatron-core would make them send
    each other the shapes first and wait for the device each time.
    """

    def __init__(self, config: TransformerConfig, lengths: Sequence[int], num_chunks: int) -> None:
        """lengths: tokens of the micro-batches (on this context-parallel rank). num_chunks: model chunks on this stage."""
        super().__init__(parallel_state.get_pipeline_model_parallel_group(), config)
        split = config.tensor_model_parallel_size if config.sequence_parallel else 1
        shapes = [[length // split, 1, config.hidden_size] for length in lengths]
        table = get_schedule_table(len(shapes), num_chunks, config.microbatch_group_size_per_vp_stage)
        # The first stage gets forward, and the last one backward, what the other end made with any chunk but the last.
        around = [shapes[number] for number, chunk in table if chunk != num_chunks - 1]
        along = [shapes[number] for number, _ in table]
        rank, last = self.pp_group.rank(), self.pp_group.size() - 1
        self._from_previous = iter(around if rank == 0 else along)
        self._from_next = iter(around if rank == last else along)

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> Shapes:
        nothing = [0, 0, 0]
        return (next(self._from_previous) if recv_prev else nothing, next(self._from_next) if recv_next else nothing)


def run_schedule(
    models: Sequence[MegatronModule],
    batches: Sequence[MicroBatch],
    forward_step: Callable[[Iterator[MicroBatch], Any], tuple[Any, Any]],
    forward_only: bool,
    collect_non_loss_data: bool = False,
) -> list[Any]:
    """Forward and, unless `forward_only`, backward of all micro-batches through this process's model chunks.

    Returns what the loss function that `forward_step` names reports of each micro-batch, on the last stage. With
    `collect_non_loss_data` that function returns any tensor, not a loss.
    """
    options: dict[str, Any] = {}
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        lengths = [batch.tokens.shape[1] for batch in batches]
        options["p2p_communicator"] = RowPipeline(models[0].config, lengths, len(models))
        options["pg_collection"] = ProcessGroupCollection.use_mpu_process_groups(_GROUPS)
    outputs: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in models] if len(models) > 1 else iter(batches),
        model=list(models),
        num_microbatches=len(batches),
        seq_length=0,  # shapes are the communicator's
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
        **options,
    )
    return outputs
