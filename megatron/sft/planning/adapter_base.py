"""The frozen weights under the adapters of a run."""

from megatron.sft.checkpoint.adapter_record import base_checksum, refuse_adapters
from megatron.sft.checkpoint.folder import Checkpoint, open_checkpoint
from megatron.sft.planning.options import TrainOptions
from megatron.sft.runtime.errors import UserError


def base_of(start: Checkpoint, options: TrainOptions, resume: bool) -> Checkpoint:
    """The checkpoint of the weights under the adapters: the start of a new run, PRETRAIN_CHECKPOINT_PATH of a resumed one.

    Another base than that of the adapters is a `UserError`.
    """
    if not resume:
        refuse_adapters(start)
        return start
    trained_on = start.manifest["adapter"]["base"]
    if not options.load.is_dir():
        raise UserError(
            f"PRETRAIN_CHECKPOINT_PATH {options.load} does not exist: the adapters in {start.path} need the weights that they "
            f"were trained on, once in {trained_on['path']}"
        )
    base = open_checkpoint(options.load)
    refuse_adapters(base)
    if base_checksum(base) != trained_on["checksum"]:
        raise UserError(
            f"PRETRAIN_CHECKPOINT_PATH {options.load} does not hold the weights that the adapters in {start.path} were trained "
            f"on ({trained_on['path']}): set it back, or start a new run in another OUTPUT_PATH"
        )
    return base
