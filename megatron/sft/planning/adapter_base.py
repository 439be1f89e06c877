"""The frozen weights under the adapters of a run."""

from megatron.sft.checkpoint.adapter_record import base_checksum, read_lora_record, refuse_adapters
from megatron.sft.checkpoint.folder import Checkpoint, open_checkpoint
from megatron.sft.planning.options import TrainOptions
from megatron.sft.runtime.errors import UserError


def base_of(start: Checkpoint, options: TrainOptions, resume: bool) -> Checkpoint:
    """The checkpoint of the weights under the adapters: the start of a new run, PRETRAIN_CHECKPOINT_PATH of a resumed one.

    A base other than the one that the adapters were trained on is a `UserError`.
    """
    if not resume:
        refuse_adapters(start)
        return start
    if read_lora_record(start) is None:
        raise UserError(
            f"{start.path} is of a run that trained all weights, LORA_RANK={options.lora_rank} asks for adapters: export and "
            "convert it, then start a new run with the result as PRETRAIN_CHECKPOINT_PATH (docs/lora.md)"
        )
    base = open_checkpoint(options.load)
    refuse_adapters(base)
    trained_on = start.manifest["adapter"]["base"]
    if base_checksum(base) != trained_on["checksum"]:
        raise UserError(
            f"PRETRAIN_CHECKPOINT_PATH {options.load} does not hold the weights that the adapters in {start.path} were trained "
            f"on ({trained_on['path']}): set it back, or start a new run in another OUTPUT_PATH"
        )
    return base
