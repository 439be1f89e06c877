"""What is computed again in the backward pass: whole layers, or the memory of single tensors that is freed until then."""

from collections.abc import Callable

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


def recompute(output: Tensor, before: Tensor, write: Callable[[Tensor], None]) -> None:
    """Free the memory of `output` and have `write(output)` fill it again when the gradient of `before` is there.

    `before` is what was made from `output` (which its backward pass reads); nothing else may read `output` until then.
    Without a gradient for `before` nothing holds `output` anyway.
    """
    if not before.requires_grad:
        return
    target = output.data  # without autograd's count of changes
    size = target.untyped_storage().size()
    target.untyped_storage().resize_(0)
    # Emptied when used: autograd keeps the hook, and what it holds, until the whole backward pass is over.
    needed = [(target, write)]

    def fill(_: Tensor) -> None:
        target, write = needed.pop()
        target.untyped_storage().resize_(size)
        write(target)

    before.register_hook(fill)
