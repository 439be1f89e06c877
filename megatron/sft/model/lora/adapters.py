"""LoRA adapters next to megatron-core's linear layers, equal to PEFT's at every layout.

An adapter's parallel state is that of its layer. Column-parallel: A is whole on every tensor-parallel rank, B split like the
layer's rows. Row-parallel: A is split like the layer's columns, its partial sums are added up over the ranks, B is whole.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.lora import AdaptedWeight, LoRA, adapted_weight, peft_names
from megatron.sft.families.rules import tensor_parallel_part
from megatron.sft.families.trained import Trained
from megatron.sft.families.weight_names import WeightEntry
from megatron.sft.model.layout import Layout
from megatron.sft.model.live_weights import live_weights
from megatron.sft.model.lora.low_rank import Dropout, add_grouped, add_product, project, project_grouped


@dataclass(frozen=True)
class Factor:
    """Which part of a factor of the whole model a tensor in this process is.

    name: PEFT's. values: the tensor, a view of `parameter`. whole: shape of the whole factor. offsets: where the part begins.
    replicated: every rank of the (expert) tensor-parallel group holds the same part.
    """

    name: str
    parameter: nn.Parameter
    values: Tensor
    whole: tuple[int, int]
    offsets: tuple[int, int]
    replicated: bool
    expert: bool


@dataclass(frozen=True)
class HeldRows:
    """The outputs of a projection that this process has, in the projection's order.

    outputs: their places in the layer's output. runs: (first row, number of rows) of the projection that lie together.
    """

    outputs: Tensor
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Split:
    """How a linear layer is spread over the ranks of `group`: its outputs (`column`), its inputs, or not at all.

    size: of the group, or 1 for a layer that each of its ranks holds whole; `replicated` then, where there are several.
    """

    column: bool
    rank: int
    size: int
    group: Any
    sequence_parallel: bool
    expert: bool
    replicated: bool = False


class Adapter(nn.Module):
    """The adapters of one linear layer, in whose place it is called.

    Parameters, in the model's precision: `{projection}_A` [rank, inputs] and `{projection}_B` [outputs, rank], with a leading
    dimension of experts where one layer holds several. `held`: for each projection the rows of B in this process.
    """

    def __init__(
        self, weights: Sequence[AdaptedWeight], base: Tensor, held: Sequence["HeldRows"], lora: LoRA, split: Split
    ) -> None:
        super().__init__()
        self.lora, self.split, self.weights = lora, split, tuple(weights)
        rows, self._runs = [each.outputs for each in held], [each.runs for each in held]
        outputs, inputs = base.shape[-2:]
        self.names = [weights[0].module(place).rpartition(".")[2] for place in weights[0].projections]
        self.grouped = base.dim() == 3
        lead = (len(weights),) if self.grouped else ()
        for name, places in zip(self.names, rows, strict=True):
            self.register_parameter(f"{name}_A", self._parameter(base, (*lead, lora.rank, inputs), split_here=not split.column))
            self.register_parameter(
                f"{name}_B", self._parameter(base, (*lead, len(places), lora.rank), split_here=split.column)
            )
        order = torch.cat(list(rows))
        in_order = torch.equal(order, torch.arange(outputs))
        # Where not all outputs have an adapter, the others get a row of zeros. A buffer: it goes to the device once.
        self._order: Tensor | None
        self.register_buffer("_order", None if in_order else _inverse(order, outputs), persistent=False)

    def _parameter(self, base: Tensor, shape: tuple[int, ...], split_here: bool) -> nn.Parameter:
        parameter: Any = nn.Parameter(torch.zeros(shape, dtype=base.dtype, device=base.device))
        split = self.split
        # Experts that are not split over tensor parallelism differ from rank to rank: each counts in the gradient's norm.
        if (split_here and split.size > 1) or (split.expert and split.size == 1):
            set_tensor_model_parallel_attributes(parameter, True, 0 if split.column else 1, 1)
        parameter.allreduce = getattr(base, "allreduce", True)
        # A part of the tokens each: megatron-core sums the gradients of parameters marked this way over TP.
        whole = split.replicated or not split_here
        parameter.sequence_parallel = split.sequence_parallel and not split.expert and whole
        return parameter

    def factors(self, letter: str) -> list[Tensor]:
        """The A's or the B's, in the order of the projections."""
        return [self.get_parameter(f"{name}_{letter}") for name in self.names]

    def forward(self, linear: Callable[..., tuple[Tensor, Tensor | None]], inputs: Tensor, *rest: Any) -> tuple[Any, Any]:
        """What `linear(inputs, *rest)` gives, with the adapters' products added to it."""
        if self.grouped:
            return self._forward_grouped(linear, inputs, *rest)
        split = self.split
        down = torch.cat(self._summed(self.factors("A"), split.column))
        up = self._blocks(self._summed(self.factors("B"), not split.column)) * self.lora.scale
        inputs, low = project(inputs, down, self._dropout())
        if split.size > 1 and not split.expert:
            low = self._exchange(low)
        outputs, bias = linear(inputs, *rest)
        return add_product(outputs, low, up), bias

    def _summed(self, factors: list[Tensor], replicated: bool) -> list[Tensor]:
        """An expert's factors, so that the gradients of those that several ranks hold are summed over these.

        What the ranks give for the same tokens megatron-core sums after the experts.
        """
        if not replicated or not self.split.expert or self.split.size == 1:
            return factors
        return [tensor_parallel.copy_to_tensor_model_parallel_region(each, group=self.split.group) for each in factors]

    def _exchange(self, low: Tensor) -> Tensor:
        """Between the two products: all tokens where A has seen a part of them, the sum where it has seen a part of each."""
        group = self.split.group
        if self.split.column:
            if self.split.sequence_parallel:
                return tensor_parallel.gather_from_sequence_parallel_region(low, group=group)
            return tensor_parallel.copy_to_tensor_model_parallel_region(low, group=group)
        if self.split.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(low, group=group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(low, group=group)

    def _blocks(self, factors: list[Tensor]) -> Tensor:
        """[outputs, projections * rank], or of each expert: each output's row has its projection's B in that projection's
        columns."""
        after = (len(factors) - 1) * self.lora.rank
        blocks = [
            F.pad(factor, (place * self.lora.rank, after - place * self.lora.rank)) for place, factor in enumerate(factors)
        ]
        stacked = torch.cat(blocks, dim=-2) if after else factors[0]
        if self._order is None:
            return stacked
        return F.pad(stacked, (0, 0, 0, 1)).index_select(-2, self._order)

    def _forward_grouped(self, linear: Callable[..., Any], inputs: Tensor, ends: Tensor, *rest: Any) -> tuple[Any, Any]:
        """Several experts in one layer, their rows one after another; ends: int32 [experts], the rows up to and with each's."""
        # Put together before their gradients are summed: those of parts would lie apart, and megatron-core's sum be lost.
        (down,) = self._summed([torch.cat(self.factors("A"), dim=1)], self.split.column)
        (up,) = self._summed([self._blocks(self.factors("B")) * self.lora.scale], not self.split.column)
        low = project_grouped(inputs, down, ends, self._dropout())
        outputs, bias = linear(inputs, ends, *rest)
        return add_grouped(outputs, low, up, ends), bias

    def _dropout(self) -> Dropout | None:
        if not self.training or not self.lora.dropout:
            return None
        # From the CPU's generator, which is alike on all ranks, and which recomputation puts back.
        draw, split = int(torch.randint(2**40, ())), self.split
        # Ranks that hold other tokens, or other columns of them, have other masks; experts are given all tokens.
        parts_of_tokens = split.sequence_parallel and not split.expert
        apart = split.rank if parts_of_tokens or not split.column else 0
        data = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        names = (self.weights[0].module(place) for place in self.weights[0].projections)
        return Dropout(self.lora.dropout, tuple(draw + zlib.crc32(f"{name} {apart} {data}".encode()) for name in names))

    def parts(self) -> Iterator[Factor]:
        """Every factor's part in this process."""
        split = self.split
        for weight_index, weight in enumerate(self.weights):
            for place, name, runs in zip(weight.projections, self.names, self._runs, strict=True):
                down, up = (self.get_parameter(f"{name}_{letter}") for letter in "AB")
                a, b = (each.data[weight_index] if self.grouped else each.data for each in (down, up))
                down_name, up_name = peft_names(weight.module(place))
                if split.column:
                    yield Factor(down_name, down, a, _pair(a.shape), (0, 0), True, split.expert)
                    whole, rows = (b.shape[0] * split.size, b.shape[1]), b.split([count for _, count in runs])
                    for part, (first, _) in zip(rows, runs, strict=True):
                        yield Factor(up_name, up, part, whole, (first, 0), split.replicated, split.expert)
                else:
                    whole, first = (a.shape[0], a.shape[1] * split.size), a.shape[1] * split.rank
                    yield Factor(down_name, down, a, whole, (0, first), False, split.expert)
                    yield Factor(up_name, up, b, _pair(b.shape), (0, 0), True, split.expert)


def _pair(shape: Sequence[int]) -> tuple[int, int]:
    rows, columns = shape
    return rows, columns


def _inverse(order: Tensor, outputs: int) -> Tensor:
    """[outputs]: the row of the stacked B's for each output, the row after the last (of zeros) for one without an adapter."""
    inverse = torch.full((outputs,), len(order))
    inverse[order] = torch.arange(len(order))
    return inverse


def add_adapters(model: Any, architecture: Architecture, layout: Layout, lora: LoRA) -> None:
    """Put adapters next to the linear layers that `lora` names, and freeze all else. Their values are zeros until set."""
    model.requires_grad_(False)
    found: dict[str, list[AdaptedWeight]] = {}
    for live in live_weights(model, architecture, layout):
        if weight := adapted_weight(live.entry, lora):
            found.setdefault(live.name.rpartition(".")[0], []).append(weight)  # several experts may lie in one module
    for name, weights in found.items():
        _add_adapter(model.get_submodule(name), weights, architecture, layout, lora, model.config)


def freeze(model: Any, architecture: Architecture, layout: Layout, trained: Trained) -> None:
    """Take the gradients from the weights that `trained` freezes."""
    for weight in live_weights(model, architecture, layout):
        if not weight.entry.is_buffer:
            weight.parameter.requires_grad_(trained.trains(weight.entry.megatron))


def _add_adapter(
    module: Any, weights: list[AdaptedWeight], architecture: Architecture, layout: Layout, lora: LoRA, config: TransformerConfig
) -> None:
    entry, base = weights[0].entry, next(module.parameters())
    expert = entry.expert is not None
    size = layout.expert_tensor_parallel if expert else layout.tensor_parallel
    if expert:
        rank, group = parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_tensor_parallel_group()
    else:
        rank, group = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_group()
    whole, sequence_parallel = entry.rule.tp_dim is None, config.sequence_parallel and size > 1
    if whole:
        split = Split(True, rank, 1, group, sequence_parallel, expert, replicated=size > 1)
    else:
        split = Split(entry.rule.tp_dim == 0, rank, size, group, sequence_parallel, expert)
    held = [_rows(entry, place, architecture, base.shape[-2], split) for place in weights[0].projections]
    adapter = Adapter(weights, base, held, lora, split)
    module.adapter = adapter
    module.forward = partial(adapter, module.forward)


def _rows(entry: WeightEntry, place: int, architecture: Architecture, outputs: int, split: Split) -> HeldRows:
    """This rank's outputs of a projection, by the rule that puts the weight together.

    Where Hugging Face's tensor holds several projections, a rank has a run of rows of each.
    """
    every = torch.arange(outputs * split.size if split.column else outputs)
    here = tensor_parallel_part(entry.rule, every, split.rank, split.size) if split.column else every
    at = torch.full((len(every),), -1)
    at[here] = torch.arange(len(here))
    found = at[entry.rule.to_hf(architecture, every)[place]]
    held = torch.nonzero(found >= 0)[:, 0]
    starts = torch.nonzero(torch.cat([held.new_ones(1), held.diff() - 1]))[:, 0].tolist()
    stops = [*starts[1:], len(held)]
    return HeldRows(found[held], tuple((int(held[a]), b - a) for a, b in zip(starts, stops, strict=True)))
