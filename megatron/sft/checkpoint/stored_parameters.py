"""The weights of a checkpoint in whichever format it is, one whole parameter at a time. Needs no process group."""

from megatron.sft.checkpoint.folder import TORCH_DIST, Checkpoint
from megatron.sft.checkpoint.stored_tensors import TorchDistParameters
from megatron.sft.checkpoint.torch_format import TorchFormatParameters
from megatron.sft.families.rules import Shape
from megatron.sft.hf_parameters import HFParameters

StoredParameters = TorchDistParameters | TorchFormatParameters


def stored_parameters(checkpoint: Checkpoint, shape: Shape, source: HFParameters | None = None) -> StoredParameters:
    """The checkpoint's whole parameters. `source` is the original model, where the checkpoint may have fewer rows than it."""
    if checkpoint.format == TORCH_DIST:
        return TorchDistParameters(checkpoint.path, shape)
    return TorchFormatParameters(checkpoint.path, shape, source)
