"""What is computed again in the backward pass: whole layers, or the memory of single tensors that is freed until then."""

from collections.abc import Callable, Sequence

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.sft.model.layout import share_of_chunk


def recomputed_whole(config: TransformerConfig, chunk: int | None) -> int:
    """How many layers of this process's model (of the interleaved chunk), its first ones, are recomputed whole.

    config: as `transformer_config` makes it, where the number is that of all layers of the pipeline stage.
    """
    if config.recompute_granularity != "full":
        return 0
    if config.recompute_method == "uniform":
        return config.num_layers
    return share_of_chunk(config.recompute_num_layers or 0, chunk or 0, config.virtual_pipeline_model_parallel_size or 1)


def recomputes_selectively(config: TransformerConfig) -> bool:
    """Whether the layers that are not recomputed whole free their norms and activation functions.

    Under delayed scaling of fp8, Transformer Engine keeps them in 8 bits and cannot be given 16 bits again.
    """
    word, method = config.recompute_granularity, config.recompute_method
    return (word == "selective" or method == "block") and not (config.fp8 and config.fp8_recipe == "delayed")


def recompute(outputs: Tensor | Sequence[Tensor], before: Tensor | Sequence[Tensor], write: Callable[..., None]) -> None:
    """Free the memory of `outputs` and have `write(*outputs)` fill it again when the gradient of `before` is there.

    `before` is all that was made from `outputs` (which its backward pass reads); nothing else may read them until then.
    Without a gradient for `before` nothing holds them anyway.
    """
    made = [each for each in _several(before) if each.requires_grad]
    if not made:
        return
    targets = [output.data for output in _several(outputs)]  # without autograd's count of changes
    sizes = [target.untyped_storage().size() for target in targets]
    for target in targets:
        target.untyped_storage().resize_(0)
    # Emptied when used: autograd keeps the hooks, and what they hold, until the whole backward pass is over.
    needed = [(targets, write)]

    def fill(_: Tensor) -> None:
        if not needed:
            return
        targets, write = needed.pop()
        for target, size in zip(targets, sizes, strict=True):
            target.untyped_storage().resize_(size)
        write(*targets)

    for each in made:
        each.register_hook(fill)


def _several(tensors: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else tensors
