"""Memory that is freed after the forward pass and filled again when the backward pass needs it."""

from collections.abc import Callable, Sequence

from torch import Tensor


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
