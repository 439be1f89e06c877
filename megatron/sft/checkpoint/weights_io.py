"""Loading only the weights of a checkpoint, in whichever format it is, into a model of this run's layout."""

from torch import nn

from megatron.sft.checkpoint import torch_dist, torch_format
from megatron.sft.checkpoint.folder import TORCH_DIST, Checkpoint
from megatron.sft.errors import UserError
from megatron.sft.layout import Layout


def load_weights(checkpoint: Checkpoint, model: nn.Module, layout: Layout) -> None:
    """Fill the model's parameters (this process's part). The `torch` format must have been written in this layout."""
    if checkpoint.format == TORCH_DIST:
        state = torch_dist.load(checkpoint.path, torch_dist.model_state(model))
        missing, unexpected = model.load_state_dict(_model_entries(state, model), strict=False)
        missing = [name for name in missing if not name.endswith("_extra_state")]
        assert not missing and not unexpected, (missing, unexpected)
        return
    written = torch_format.find_layout(checkpoint.path)
    if (written.tensor_parallel, written.pipeline_parallel) != (layout.tensor_parallel, layout.pipeline_parallel):
        raise UserError(
            f"{checkpoint.path} was written at TP {written.tensor_parallel} PP {written.pipeline_parallel} in the torch "
            f"format, this run has TP {layout.tensor_parallel} PP {layout.pipeline_parallel}: "
            "convert with CKPT_FORMAT=torch_dist, which loads at any sizes"
        )
    torch_format.load(checkpoint.path, model, layout)


def _model_entries(state: dict[str, object], model: nn.Module) -> dict[str, object]:
    names = set(model.state_dict())
    return {name: value for name, value in state.items() if name in names}
