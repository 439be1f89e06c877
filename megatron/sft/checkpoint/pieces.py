"""The state of a run as pieces: boxes of named tensors, which this process holds the values of.

A checkpoint stores tensors in the model's own shapes, whatever the parallel layout. Every process writes its own pieces, and
a run in another layout reads its pieces out of them. megatron-core says which box of which tensor a parameter is.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

from megatron.sft.checkpoint import torch_dist

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A box of the tensor `key`, which has the shape `whole`. `values()` gives its numbers on any device, in any shape."""

    key: str
    offsets: Sizes
    sizes: Sizes
    whole: Sizes
    dtype: torch.dtype
    values: Callable[[], Tensor]
    # The tensor on disk may have another number of rows: the vocabulary is padded for tensor parallelism.
    padded: bool = False

    @property
    def num_bytes(self) -> int:
        return prod(self.sizes) * self.dtype.itemsize


def piece_of(tensor: ShardedTensor) -> Piece:
    """The box that megatron-core describes, with the values where they are."""
    data: Tensor = tensor.data.detach()
    sizes = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    return Piece(
        tensor.key,
        tuple(tensor.global_offset),
        sizes,
        tuple(tensor.global_shape),
        data.dtype,
        lambda: data,
        tensor.allow_shape_mismatch,
    )


def model_tensors(modules: Iterable[nn.Module]) -> list[ShardedTensor]:
    """Boxes of all parameters of this process, in megatron-core's description; their data are the parameters' own memory."""
    found = []
    with torch.no_grad():
        for module in modules:
            for value in nested_values(torch_dist.model_state(module)):
                # A gate and an up projection side by side are one parameter here and lie apart in the checkpoint.
                parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
                found += list(parts)
    assert all(isinstance(tensor, ShardedTensor) for tensor in found), found
    return found


def is_written_here(tensor: ShardedTensor) -> bool:
    """Whether this process holds the copy that is saved, apart from data parallelism, over which all copies are equal."""
    return not any(tensor.replica_id[:-1])


def shared_out(tensors: list[ShardedTensor]) -> list[ShardedTensor]:
    """Of the tensors that every data-parallel rank has, those that this one writes: about as many bytes on each."""
    copies = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    loads, mine = [0] * copies, []
    for tensor in filter(is_written_here, tensors):
        if ".experts." in tensor.key:  # has other copies than the rest of the model
            if tensor.replica_id[-1] == 0:
                mine.append(tensor)
            continue
        owner = loads.index(min(loads))
        loads[owner] += tensor.data.nbytes
        if owner == tensor.replica_id[-1]:
            mine.append(tensor)
    return mine


def pieces_of_range(
    parameter: Tensor, parts: list[ShardedTensor], start: int, stop: int
) -> Iterator[tuple[Piece, int, int]]:
    """The boxes of elements `start` to `stop` of a flattened parameter that consists of `parts`.

    Yields each with its place in that range, (first, last + 1). Its values are the parameter's own until they are replaced.
    """
    for part in parts:
        first = (part.data.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        low, high = max(start - first, 0), min(stop - first, part.data.numel())
        if low >= high:
            continue
        piece = piece_of(part)
        lead = len(piece.offsets) - part.data.dim()
        for offsets, sizes, at in boxes(tuple(part.data.shape), low, high):
            place = (*piece.offsets[:lead], *(a + b for a, b in zip(piece.offsets[lead:], offsets, strict=True)))
            box = replace(piece, offsets=place, sizes=(*piece.sizes[:lead], *sizes))
            yield box, first + at - start, first + at - start + prod(sizes)


def boxes(shape: Sizes, start: int, stop: int) -> Iterator[tuple[Sizes, Sizes, int]]:
    """Boxes that together are the elements `start` to `stop` of a row-major tensor: offsets, sizes, first element."""
    if len(shape) <= 1:
        yield ((start,), (stop - start,), start) if shape else ((), (), start)
        return
    inner = prod(shape[1:])
    row = start // inner
    if start % inner or stop - start < inner:
        end = min(stop, (row + 1) * inner)
        for offsets, sizes, at in boxes(shape[1:], start - row * inner, end - row * inner):
            yield (row, *offsets), (1, *sizes), row * inner + at
        if end < stop:
            yield from boxes(shape, end, stop)
        return
    rows = (stop - start) // inner
    yield (row, *(0,) * (len(shape) - 1)), (rows, *shape[1:]), start
    if start + rows * inner < stop:
        yield from boxes(shape, start + rows * inner, stop)


def parts_of_parameters(
    tensors: list[ShardedTensor], parameters: Iterable[nn.Parameter]
) -> dict[Any, list[ShardedTensor]]:
    """The boxes that lie in each parameter's memory."""
    by_address = sorted(parameters, key=lambda p: p.data_ptr())
    found: dict[Any, list[ShardedTensor]] = {parameter: [] for parameter in by_address}
    addresses = [parameter.data_ptr() for parameter in by_address]
    from bisect import bisect_right

    for tensor in tensors:
        index = bisect_right(addresses, tensor.data.data_ptr()) - 1
        if index >= 0:
            parameter = by_address[index]
            if tensor.data.data_ptr() < addresses[index] + parameter.nbytes:
                found[parameter].append(tensor)
    for parameter, parts in found.items():
        assert sum(part.data.numel() for part in parts) == parameter.numel(), "a parameter is not described whole"
    return found
