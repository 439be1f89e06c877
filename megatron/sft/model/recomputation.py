"""Memory that is freed after the forward pass and filled again when the backward pass needs it."""

from collections.abc import Callable, Sequence

from torch import Tensor


def recompute(output: Tensor, before: Tensor | Sequence[Tensor], write: Callable[[Tensor], None]) -> None:
    """Free the memory of `output` and have `write(output)` fill it again when the gradient of `before`, or one of it, is there.

    `before` is all that was made from `output` (which its backward pass reads); nothing else may read `output` until then.
    Without a gradient for `before` nothing holds `output` anyway.
    """
    made = [each for each in ([before] if isinstance(before, Tensor) else before) if each.requires_grad]
    if not made:
        return
    target = output.data  # without autograd's count of changes
    size = target.untyped_storage().size()
    target.untyped_storage().resize_(0)
    # Emptied when used: autograd keeps the hook, and what it holds, until the whole backward pass is over.
    needed = [(target, write)]

    def fill(_: Tensor) -> None:
        if not needed:
            return
        target, write = needed.pop()
        target.untyped_storage().resize_(size)
        write(target)

    for each in made:
        each.register_hook(fill)
