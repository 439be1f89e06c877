"""Memory that is freed after the forward pass and filled again when the backward pass needs it."""

from collections.abc import Callable

from torch import Tensor


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
